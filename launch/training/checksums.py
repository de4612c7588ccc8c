"""Checksums: the size and sha256 of every file of a checkpoint, written with it and looked at before it is loaded.

They tell what a disk or a copy has changed. They are no signature: what may run is restricted where files are read.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

NAME = "checksums.json"
_LOADED = (".pt", ".json", ".yaml")
"""What is loaded: tensors, the record and the policy. Another file that lies there, a note, needs no checksum."""


def checksums(folder: Path, rank: int, size: int) -> dict[str, str]:
    """`SIZE:SHA256` by relative path, of this rank's share of the files below `folder`."""
    return {name: checksum(folder / name) for name in _files(folder)[rank::size]}


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    (folder / NAME).write_text(json.dumps(dict(sorted(sums.items())), indent=1) + "\n")


def damages(folder: Path, written: Sequence[str], rank: int, size: int) -> list[str]:
    """What is wrong with this rank's share of the files below `folder`, a sentence each; [] if nothing is.

    `written`: the files that the record names. One may be gone together with its checksum.
    """
    try:
        sums = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        sums = None
    if not isinstance(sums, dict) or not all(isinstance(each, str) for each in sums.values()):
        return [f"{NAME} is missing or cannot be read"]
    found = []
    loaded = [name for name in _files(folder) if name.endswith(_LOADED)]
    for name in sorted({*sums, *written, *loaded})[rank::size]:
        path = folder / name
        try:
            if not path.is_file():
                found.append(f"{name} is missing")
            elif name not in sums:
                found.append(f"{name} has no checksum")
            elif str(path.stat().st_size) != (nbytes := sums[name].partition(":")[0]):
                found.append(f"{name} has {path.stat().st_size} bytes and not {nbytes}")
            elif checksum(path) != sums[name]:
                found.append(f"{name} has another checksum than was written")
        except (OSError, ValueError) as error:
            found.append(f"{name} cannot be read ({error})")
    return found


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.stat().st_size}:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _files(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    return sorted(path.relative_to(folder).as_posix() for path in files)

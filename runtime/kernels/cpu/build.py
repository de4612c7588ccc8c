"""Build: compile a C++ file of this folder at first use, keep the shared object for the user, load it.

    source and header text + flags + compiler version + CPU features  --sha256-->  KEY
    CACHE/lpcompile/<stem>-KEY-<sha256 of the object>.so

CACHE is $XDG_CACHE_HOME or ~/.cache. What is loaded runs, so the folder must be the user's own and no one else's to
write, and an object must have the digest that its name says; one that has not (cut short, empty, another file) is
built anew. Where there is no such folder, one that ends with the process serves, after a warning. A file lock lets one
process compile while others wait, and the object appears by an atomic rename, so a reader never sees half of it.
Nothing is compiled when this module is imported.
"""

import atexit
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

from runtime.kernels.constants import DEFINES

COMPILERS = ("g++", "c++", "clang++")
# -fno-trapping-math: comparisons become vector selects; -ffp-contract=off: a * b + c stays two roundings, as in torch;
# whole vectors where the CPU has them: compilers take half ones by default, and casts are 1.2 to 1.6 x slower so
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
TIMEOUT_SECONDS = 300


@lru_cache(maxsize=64)
def load_library(source: Path) -> ctypes.CDLL | None:
    """The shared object compiled from `source`; None, after one warning that says what is missing, if there is none."""
    try:
        return ctypes.CDLL(str(_built(source)))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
        warnings.warn(
            f"{source.name}: the C++ kernel could not be built ({said[-500:]}); the pure-torch path serves, with equal "
            f"bits and slower. Install g++ with OpenMP and have a writable "
            f"{_named_folder() or 'XDG_CACHE_HOME'} to get it back.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _built(source: Path) -> Path:
    """The path of the shared object, compiled now if no earlier process has."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise OSError(f"no C++ compiler: looked for {', '.join(COMPILERS)}")
    version = _run([compiler, "--version"]).stdout
    headers = (header.read_text() for header in sorted(source.parent.glob("*.h")))
    facts = "\n".join((source.read_text(), *headers, *FLAGS, *DEFINES, compiler, version, _cpu_features()))
    folder, stem = _cache_folder(), f"{source.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:24]}"
    if found := _found(folder, stem):
        return found
    with open(folder / f"{stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := _found(folder, stem):
            return found
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            fresh = Path(aside) / f"{stem}.so"
            _run([compiler, *FLAGS, *DEFINES, "-o", str(fresh), str(source)])
            target = folder / f"{stem}-{_digest(fresh)}.so"
            os.replace(fresh, target)
    return target


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """What a compiler says may be in any encoding."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=TIMEOUT_SECONDS
    )


def _found(folder: Path, stem: str) -> Path | None:
    """The object of this name that is what its name says, and ours; others of the name are removed."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if not _why_not_ours(path) and path.name == f"{stem}-{_digest(path)}.so":
            return path
        path.unlink(missing_ok=True)
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _cache_folder() -> Path:
    """The folder of the objects, made if it is not there; one of this process where what runs may not be taken from
    the named one.
    """
    folder = _named_folder()
    why = "there is no home directory and XDG_CACHE_HOME is not set" if folder is None else ""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            why = _why_not_ours(folder)
        except OSError as error:
            why = str(error)
    if folder is not None and not why:
        return folder
    private = Path(tempfile.mkdtemp(prefix="lpcompile-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    warnings.warn(
        f"compiled kernels are kept for this process alone: {why}. Let XDG_CACHE_HOME name a folder of your own that "
        "no one else may write.",
        RuntimeWarning,
        stacklevel=2,
    )
    return private


def _named_folder() -> Path | None:
    """$XDG_CACHE_HOME/lpcompile or ~/.cache/lpcompile; None for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(named) / "lpcompile" if named else Path.home() / ".cache" / "lpcompile"
    except RuntimeError:
        return None


def _why_not_ours(path: Path) -> str:
    """Why what lies there may be another's: "" if it is this user's or root's, no link, and written by no one else."""
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        return f"{path} is a link"
    if facts.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user (uid {facts.st_uid})"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} may be written by others (mode {stat.S_IMODE(facts.st_mode):o})"
    return ""


def _cpu_features() -> str:
    """What -march=native depends on: a home shared by unlike machines must not share objects."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))

"""Every block of the guides and of docs/extending.md runs, in the order of its page, in a folder of its own: Python in
one process a page, commands as a shell would run them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "lpcompile", "passes", "runtime")
EXTENDING = ROOT / "docs" / "extending.md"
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return _FENCE.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guides_run(page: Path, tmp_path: Path) -> None:
    blocks = _blocks(page)
    assert blocks
    assert {language for language, _ in blocks} <= {"python", "sh"}
    python = "\n".join(text for language, text in blocks if language == "python")
    _run([sys.executable, "-W", "error::UserWarning", "-c", python], tmp_path)
    _run_commands(blocks, tmp_path)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guides_are_short(page: Path) -> None:
    assert all(text.count("\n") < 30 for _, text in _blocks(page)), "from nothing to a result in under 30 lines"


def test_extending_does_what_it_says(tmp_path: Path) -> None:
    """Files and changed lines go into a copy of the tree; what is then true is asked there, each block by itself."""
    tree, folder = tmp_path / "tree", tmp_path / "folder"
    folder.mkdir()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    checks = []
    blocks = _blocks(EXTENDING)
    for language, text in blocks:
        head, _, rest = text.partition("\n")
        path = tree / head.removeprefix("# ")
        if not head.startswith("# "):
            checks += [text] if language == "python" else []
        elif language == "diff":
            path.write_text(_changed(path.read_text(encoding="utf-8"), rest, head), encoding="utf-8")
        else:
            assert not path.exists(), path
            path.write_text(rest, encoding="utf-8")
    assert len(checks) >= 8
    each_alone = f"for code in {checks!r}: exec(compile(code, code, 'exec'), {{}})"
    _run([sys.executable, "-W", "error::UserWarning", "-c", each_alone], folder, tree)
    _run_commands(blocks, folder, tree)


def _changed(text: str, diff: str, where: str) -> str:
    """The text with the lines of one hunk changed; what the hunk expects stands there once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, f"{where}: no one place with\n{before}"
    return text.replace(before, after)


def _run_commands(blocks: list[tuple[str, str]], folder: Path, tree: Path = ROOT) -> None:
    for line in "".join(text for language, text in blocks if language == "sh").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "lpcompile"
        _run([sys.executable, "-m", "launch", *arguments], folder, tree)


def _run(command: list[str], folder: Path, tree: Path = ROOT) -> None:
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

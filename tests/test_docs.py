"""Every block of the guides runs, in the order of its page, in a folder of its own: Python in one process a page,
commands as a shell would run them.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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
    for line in "".join(text for language, text in blocks if language == "sh").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "lpcompile"
        _run([sys.executable, "-m", "launch", *arguments], tmp_path)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guides_are_short(page: Path) -> None:
    assert all(text.count("\n") < 30 for _, text in _blocks(page)), "from nothing to a result in under 30 lines"


def _run(command: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

"""The bench verb: lists by docstring, runs as modules, hands arguments and exit codes on."""

from pathlib import Path

import pytest

from launch.commands.bench import find_benchmarks, run_benchmarks
from launch.training.config import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "_common.py").write_text('"""Shared."""')
    (folder / "good.py").write_text('"""Good: runs."""\nimport sys\nopen("seen", "w").write(" ".join(sys.argv[1:]))\n')
    (folder / "bad.py").write_text('"""Bad: fails."""\nraise SystemExit(3)\n')
    return folder


def test_lists_names_with_their_first_line(folder: Path) -> None:
    assert find_benchmarks(folder) == {"bad": "Bad: fails.", "good": "Good: runs."}


def test_runs_one_with_its_arguments(folder: Path) -> None:
    assert run_benchmarks("good", ["--size", "4"], folder) == 0
    assert (folder.parent / "seen").read_text() == "--size 4"


def test_hands_the_exit_code_on(folder: Path) -> None:
    assert run_benchmarks(None, [], folder) == 3


def test_an_unknown_name_is_told_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r'"god" is not a benchmark. Did you mean "good"'):
        run_benchmarks("god", [], folder)

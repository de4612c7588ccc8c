"""The kernel cache: what is not what its name says is built anew, what another may write is not loaded."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.kernels.cpu import build
from tests.machine_facts import needs_compiler

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small file of its own, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build._cache_folder.cache_clear()
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    yield path
    build._cache_folder.cache_clear()


def _answer(source: Path) -> int:
    """As a new process loads it; a warning is an error."""
    code = (
        "import sys, pathlib; from runtime.kernels.cpu.build import load_library;"
        "print(load_library(pathlib.Path(sys.argv[1])).answer())"
    )
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(source)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return int(done.stdout)


@needs_compiler
@pytest.mark.parametrize("damage", ["cut short", "empty", "another object"])
def test_an_object_that_is_not_what_its_name_says_is_built_anew(damage: str, source: Path, tmp_path: Path) -> None:
    """One cut short was a bus error at every start; one without the symbols an AttributeError."""
    good = build._built(source)
    content = good.read_bytes()
    if damage == "cut short":
        good.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        good.write_bytes(b"")
    else:
        other = tmp_path / "other.cpp"
        other.write_text('extern "C" int question() { return 41; }\n')
        good.write_bytes(build._built(other).read_bytes())
    again = build._built(source)
    assert again.read_bytes() == content
    assert [path.name for path in again.parent.glob("answer-*.so")] == [again.name]
    assert _answer(source) == 42


@needs_compiler
def test_a_good_object_is_not_built_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build._built(source)
    ran = build._run
    monkeypatch.setattr(build, "_run", lambda command: ran(command) if "--version" in command else pytest.fail("built"))
    assert build._built(source) == first


@needs_compiler
@pytest.mark.parametrize(("mode", "says"), [(0o777, "may be written by others"), (0o770, "mode 770")])
def test_a_folder_that_others_may_write_is_not_used(mode: int, says: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "lpcompile"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.warns(RuntimeWarning, match=says):
        found = build._built(source)
    assert found.parent != folder
    assert list(folder.iterdir()) == []
    assert build.ctypes.CDLL(str(found)).answer() == 42


@needs_compiler
def test_a_folder_and_objects_of_another_user_are_not_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "lpcompile"
    folder.mkdir(parents=True, mode=0o700)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        monkeypatch.setattr(build.os, "geteuid", lambda: 12345)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert build._built(source).parent != folder


@needs_compiler
def test_a_folder_that_is_a_link_is_not_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lpcompile").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="is a link"):
        build._built(source)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@needs_compiler
def test_an_object_that_others_may_write_is_built_anew(source: Path) -> None:
    first = build._built(source)
    first.chmod(0o666)
    second = build._built(source)
    assert second.stat().st_mode & 0o022 == 0


@needs_compiler
def test_a_user_without_a_home_is_served(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", home)
    with pytest.warns(RuntimeWarning, match="no home directory"):
        library = build.load_library(source)
    assert library is not None
    assert library.answer() == 42


@needs_compiler
def test_what_a_compiler_says_may_be_in_any_encoding(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = next(path for name in build.COMPILERS if (path := build.shutil.which(name)))
    wrapper = tmp_path / "g++"
    wrapper.write_text(f"#!/bin/sh\nprintf '\\351\\377'\nprintf '\\351' >&2\nexec {real} \"$@\"\n")
    wrapper.chmod(0o700)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(wrapper))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = build.load_library(source)
    assert library is not None
    assert library.answer() == 42

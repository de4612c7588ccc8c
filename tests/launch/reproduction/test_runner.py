"""The runner: a stopped run goes on from its last unit, a torn file is measured again, the page tells what is there."""

import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.cli import run
from launch.reproduction import runner
from launch.reproduction.registry import EXPERIMENTS, experiment
from launch.reproduction.runner import reproduce
from launch.reproduction.store import Store
from launch.training.config import ConfigError

KEYS = ["a", "b", "c"]


class Fake(types.SimpleNamespace):
    """An experiment of three units that counts what it measures, and is stopped at `stop_at`."""

    TITLE = "Fake"

    def __init__(self) -> None:
        super().__init__(measured=[], stop_at=None)

    def units(self, form: str) -> list[str]:
        return KEYS

    def measure(self, key: str, form: str) -> dict[str, Any]:
        if key == self.stop_at:
            raise KeyboardInterrupt
        self.measured.append(key)
        return {"key": key}

    def tell(self, results: Mapping[str, Any], form: str, plots: Path) -> str:
        return f"told {sorted(results)}"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(runner, "EXPERIMENTS", {"fake": ""})
    monkeypatch.setattr(runner, "experiment", lambda name: made)
    return made


def test_a_stopped_run_goes_on_from_its_last_unit(fake: Fake, tmp_path: Path) -> None:
    fake.stop_at = "c"
    with pytest.raises(KeyboardInterrupt):
        reproduce([], "short", tmp_path / "out", tmp_path / "docs")
    page = tmp_path / "docs" / "reproduction.md"
    assert "2 of 3 units" in page.read_text(), "the page of what was done is written all the same"
    assert "told ['a', 'b']" in page.read_text()
    fake.stop_at = None
    assert reproduce([], "short", tmp_path / "out", tmp_path / "docs") == page
    assert fake.measured == KEYS, "each once"
    assert "told ['a', 'b', 'c']" in page.read_text()


def test_a_torn_file_is_measured_again(fake: Fake, tmp_path: Path) -> None:
    reproduce([], "short", tmp_path, tmp_path)
    (tmp_path / "short" / "fake" / "b.json").write_text('{"key": ')
    (tmp_path / "short" / "fake" / "c.json").rename(tmp_path / "short" / "fake" / "c.json.77.tmp")
    reproduce([], "short", tmp_path, tmp_path)
    assert fake.measured == [*KEYS, "b", "c"]


def test_forms_are_apart_and_a_page_alone_runs_nothing(fake: Fake, tmp_path: Path) -> None:
    reproduce([], "short", tmp_path, tmp_path)
    reproduce([], "full", tmp_path, tmp_path, page_only=True)
    assert fake.measured == KEYS
    assert "Not run in this form" in (tmp_path / "reproduction.md").read_text()


def test_a_result_is_written_aside_and_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, "short", "fake")
    store.save("a", {"x": 1})

    def torn(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", torn)
    with pytest.raises(OSError, match="No space"):
        store.save("a", {"x": 2})
    assert store.load("a") == {"x": 1}
    assert store.load("never") is None


def test_a_full_disk_is_a_sentence(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Store, key: str, result: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(Store, "save", full)
    with pytest.raises(Exception, match="the disk is full"):
        reproduce([], "short", tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["swampin"], 'reproduce: "swampin" is not an experiment. Did you mean "swamping"?'),
        (["--full", "--short"], "one form at a time"),
        (["swamping", "--out", "file"], "--out file: results cannot be kept here"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert run(["reproduce", *arguments]) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert told.err.count("\n") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"]


def test_every_row_is_an_experiment_whose_keys_are_file_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in EXPERIMENTS)
    for name in EXPERIMENTS:
        module = experiment(name)
        for form in ("smallest", "short", "full"):
            keys = module.units(form)  # type: ignore[arg-type]
            assert len(set(keys)) == len(keys)
            assert all("/" not in key for key in keys)
        assert module.TITLE
    with pytest.raises(ConfigError):
        experiment("nothing")


def test_without_scipy_nothing_is_run(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Try pip install scipy"):
        reproduce([], "short", tmp_path, tmp_path)
    assert fake.measured == []


def test_results_are_json_that_others_read(fake: Fake, tmp_path: Path) -> None:
    reproduce([], "short", tmp_path, tmp_path)
    assert json.loads((tmp_path / "short" / "fake" / "a.json").read_text()) == {"key": "a"}

"""`--telemetry`: what it says, and what a run leaves behind."""

import json
from pathlib import Path

import pytest

from launch.training.config import ConfigError, RunConfig, load_config
from launch.training.precision_options import parse_precision_options
from lpcompile import LpError, load_policy
from tests.launch.test_train import metrics, succeed

TINY = [
    *["--layers", "1", "--width", "32", "--heads", "2", "--context", "16", "--batch", "4", "--data", "text.txt"],
    *["--steps", "5", "--warmup", "1", "--device", "cpu", "--engine", "ddp"],
]


@pytest.mark.parametrize(
    ("text", "every", "sample", "formats"),
    [
        ("every=20", 20, 8192, 7),
        ("20", 20, 8192, 7),
        ("every=7, sample=100, counterfactuals=mxfp8+e4m3 tensor", 7, 100, 2),
    ],
)
def test_options(text: str, every: int, sample: int, formats: int) -> None:
    found = parse_precision_options(text)
    assert (found.every, found.sample, len(found.counterfactuals)) == (every, sample, formats)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("every=0", "Expected 1 or more. Got 0"),
        ("evry=5", 'Did you mean "every"'),
        ("every=5,every=6", "said twice"),
        ("counterfactuals=mxfp9", 'Did you mean "mxfp8"'),
        ("every=", "not a number for every"),
    ],
)
def test_options_that_do_not_exist(text: str, sentence: str) -> None:
    with pytest.raises(LpError, match=sentence):
        load_config({"telemetry": text})


def test_graphs_are_refused() -> None:
    with pytest.raises(ConfigError, match="eager code"):
        load_config({"telemetry": "every=5", "capture": "joint"})
    assert RunConfig(telemetry="every=5").telemetry == "every=5"


@pytest.mark.slow
def test_a_run_leaves_its_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "text.txt").write_text("the matrix of a kernel is a gradient of the scale " * 200)
    (tmp_path / "mine.yaml").write_text(
        "version: 1\nrules:\n  - match: {op: linear}\n    fwd: {x: e4m3, w: e4m3}\n    bwd: {dy: e5m2, w: e4m3}\n"
        "    grad: {dy: e5m2, x: e4m3}\n"
    )
    losses, printed = [], ""
    for extra in (["--out", "plain"], ["--out", "watched", "--telemetry", "every=2"]):
        printed = succeed(tmp_path, *TINY, "--policy", "mine.yaml", *extra)
        losses.append([step["loss"] for step in metrics(tmp_path / extra[1])])
    assert losses[0] == losses[1]
    folder = tmp_path / "watched"
    assert json.loads((folder / "telemetry.json").read_text())["steps"] == [0, 2, 4]
    assert "<svg" in (folder / "telemetry.html").read_text()
    assert load_policy(folder / "suggested.yaml").rules[-1] == load_policy(tmp_path / "mine.yaml").rules[-1]
    assert "loses by" in printed
    assert "telemetry.html has the plots" in printed
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    site = "transformer.h.0.mlp.c_fc"
    assert [each.step for each in board.Scalars(f"precision/{site}/fwd_x/sqnr_db")] == [1, 3, 5]
    assert f"precision/{site}/dy/log2" in board.Tags()["histograms"]

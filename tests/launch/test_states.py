"""Runs with scales that have a state: resume is bit-exact. A run whose every step overflows stops with the layer."""

import random
from pathlib import Path

import pytest

from launch.training.record import has_checkpoint
from tests.launch.test_train import DDP, TINY, ZERO, metrics, succeed, train

DELAYED = """
version: 1
name: own-scales
rules:
  - match: {op: linear, not: lm_head}
    fwd: {x: &x {format: e4m3, scale: {rule: delayed, history: 4, per_rank: true}}, w: *x}
    bwd: {dy: &dy {format: e5m2, scale: {rule: delayed, history: 4, per_rank: true}}, w: *x}
    grad: {dy: *dy, x: *x}
"""
STUCK = """
version: 1
name: stuck
rules:
  - match: {op: linear}
    bwd: {dy: e2m1}
    grad: {dy: e2m1}
loss_scale: {kind: dynamic, init: 2097152, min: 1048576}
"""


def _prepare(folder: Path) -> None:
    draw = random.Random(0)
    words = ["matrix", "kernel", "gradient", "format", "scale", "round", "the", "of", "a", "is"]
    (folder / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(3300)))
    (folder / "own-scales.yaml").write_text(DELAYED)
    (folder / "stuck.yaml").write_text(STUCK)


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [
        pytest.param("te-delayed", [*DDP, "--grad-accumulation", "2"], id="ddp"),
        pytest.param("own-scales.yaml", DDP, id="ddp-per-rank"),
        pytest.param("int4-fp4-2020", DDP, id="ddp-grad-scale", marks=pytest.mark.slow),
        *(pytest.param("te-delayed", [*ZERO, stage], id=f"zero{stage}", marks=pytest.mark.slow) for stage in "0123"),
        pytest.param("te-delayed", [*DDP, "--dtype", "bf16"], id="ddp-bf16", marks=pytest.mark.slow),
        pytest.param("te-delayed", [*ZERO, "2", "--dtype", "bf16"], id="zero2-bf16", marks=pytest.mark.slow),
        pytest.param("te-delayed", [*DDP, "--capture", "joint"], id="ddp-joint", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(tmp_path: Path, policy: str, arguments: list[str]) -> None:
    _prepare(tmp_path)
    run = [*TINY, *arguments, "--policy", policy, "--nproc", "2", "--steps", "8", "--save-every", "4"]
    succeed(tmp_path, *run, "--out", "whole")
    succeed(tmp_path, "--resume", "whole/checkpoints/step-000004", "--out", "half")
    keys = ("step", "loss", "validation", "grad_norm")
    whole, half = ([[step[key] for key in keys] for step in metrics(tmp_path / name)] for name in ("whole", "half"))
    assert half == whole[4:]
    assert whole[-1][1] < whole[0][1]


def test_a_run_that_overflows_for_ever_stops_with_layer_and_role_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    _prepare(tmp_path)
    run = [*TINY, *DDP, "--policy", "stuck.yaml", "--nproc", "2", "--steps", "60", "--save-every", "8", "--out", "run"]
    done = train(tmp_path, *run)
    assert done.returncode == 2
    sentence = done.stderr.splitlines()[-1]
    assert "step 33: the last 32 steps were all skipped because their gradients overflowed" in sentence
    assert "its last checkpoint is in" in sentence
    assert "Got loss scale 1.04858e+06 (dynamic), overflow first in rank 0: lm_head bwd." in sentence
    assert done.stderr.count("were all skipped") == 1
    steps = metrics(tmp_path / "run")
    assert len(steps) == 32
    assert {step["overflowed"] for step in steps} == {"rank 0: lm_head bwd"}
    assert {step["lr"] for step in steps} == {steps[0]["lr"]}, "a step that was skipped moves no schedule"
    assert "step 1 skipped: a gradient overflowed, first in rank 0: lm_head bwd; loss scale" in done.stdout
    assert has_checkpoint(tmp_path / "run")
    assert "step 33 skipped" in succeed(tmp_path, "--resume", "run", "--steps", "34", "--out", "again")

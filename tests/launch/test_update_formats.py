"""Runs whose policy has an `update`: 2 processes, resume is bit-exact, what an engine cannot do is refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lpcompile import PolicyError, load_policy
from tests.launch.test_train import DDP, TINY, ZERO, succeed, train

NEAREST = "{master: dlfloat16, momentum: dlfloat16, variance: bf16}"
COAT = "{momentum: {format: e4m3, block: 128, expand: true}, variance: e4m3/128/expand}"
CHANCE = "{master: dlfloat16, momentum: 1-5-2, rounding: stochastic}"
SPLIT = "{master: bf16+16, momentum: bf16, variance: bf16}"
SGD, ADAMW = ["--optimizer", "sgd", "--lr", "0.05"], ["--optimizer", "adamw"]


def _prepare(folder: Path, update: str) -> None:
    draw = random.Random(0)
    words = ["matrix", "kernel", "gradient", "format", "scale", "round", "the", "of", "a", "is"]
    (folder / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(3300)))
    (folder / "p.yaml").write_text(f"version: 1\nextends: [hfp8]\nupdate: {update}\n")


def _steps(run: Path) -> list[list[Any]]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [[step[key] for key in ("step", "loss", "validation", "grad_norm")] for step in lines]


@pytest.mark.parametrize(
    ("update", "arguments"),
    [
        pytest.param(CHANCE, [*DDP, *SGD], id="ddp-sgd-stochastic"),
        pytest.param(NEAREST, [*ZERO, "2", *ADAMW], id="zero2-adamw-nearest"),
        pytest.param(COAT, [*DDP, *ADAMW], id="ddp-adamw-coat", marks=pytest.mark.slow),
        pytest.param(SPLIT, [*DDP, *ADAMW, "--dtype", "bf16"], id="ddp-adamw-split", marks=pytest.mark.slow),
        pytest.param(CHANCE, [*ZERO, "2", *SGD], id="zero2-sgd-stochastic", marks=pytest.mark.slow),
        pytest.param(CHANCE, [*ZERO, "0", *SGD], id="zero0-sgd-stochastic", marks=pytest.mark.slow),
        pytest.param(NEAREST, [*ZERO, "1", *SGD], id="zero1-sgd-nearest", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(tmp_path: Path, update: str, arguments: list[str]) -> None:
    _prepare(tmp_path, update)
    run = [*TINY, *arguments, "--policy", "p.yaml", "--nproc", "2", "--steps", "6", "--save-every", "3"]
    printed = succeed(tmp_path, *run, "--out", "whole")
    plain = " ".join(printed.split())
    if "deepspeed" not in arguments and update == CHANCE:
        assert "bytes a parameter: weight 4, master 0, moments 1, gradient 4" in plain
    assert f"optimizer: {arguments[arguments.index('--optimizer') + 1]}, master " in printed
    succeed(tmp_path, "--resume", "whole/checkpoints/step-000003", "--out", "half")
    expected = _steps(tmp_path / "whole")
    assert _steps(tmp_path / "half") == expected[3:]
    assert expected[-1][1] < expected[0][1]


def test_random_bits_are_an_elements_own_under_every_engine(tmp_path: Path) -> None:
    """DDP, whose ranks hold all, and ZeRO 1 and 2, which cut a flat group anywhere, train alike."""
    _prepare(tmp_path, CHANCE)
    (tmp_path / "p.yaml").write_text(f"version: 1\nextends: [fp32-emulated]\nupdate: {CHANCE}\n")
    run = [*TINY, *SGD, "--policy", "p.yaml", "--nproc", "2", "--steps", "4", "--clip", "0"]
    losses = {}
    for name, engine in {"ddp": DDP, "zero1": [*ZERO, "1"], "zero2": [*ZERO, "2"]}.items():
        succeed(tmp_path, *run, *engine, "--out", name)
        losses[name] = [line[:3] for line in _steps(tmp_path / name)]
    assert losses["zero1"] == losses["ddp"]
    assert losses["zero2"] == losses["ddp"]


def test_masters_are_what_the_policy_says(tmp_path: Path) -> None:
    """A checkpoint of one rank: weights on the grid of 1-6-9, momentum in codes of 8 bits."""
    _prepare(tmp_path, CHANCE)
    succeed(tmp_path, *TINY, *DDP, *SGD, "--policy", "p.yaml", "--nproc", "1", "--steps", "2", "--out", "run")
    saved = torch.load(tmp_path / "run/checkpoints/step-000002/replica.pt", weights_only=True)
    weights = [value for name, value in saved["model"].items() if name.endswith("weight")]
    assert weights
    assert all(torch.equal(value.view(torch.int32) & 0x3FFF, torch.zeros_like(value).int()) for value in weights)
    states = saved["optimizer"]["state"].values()
    assert {state["momentum_buffer"].dtype for state in states} == {torch.uint8}


@pytest.mark.parametrize(
    ("update", "arguments", "sentence"),
    [
        (CHANCE, [*ZERO, "0", "--dtype", "bf16"], "an element of DeepSpeed's flat masters does not know its random"),
        (NEAREST, [*ZERO, "3"], "ZeRO-3 has AdamW in fp32 alone. Expected the defaults"),
        (SPLIT, [*ZERO, "1", "--dtype", "bf16"], "DeepSpeed keeps fp32 masters of its own"),
        (COAT, [*ZERO, "1", *ADAMW], "where those end in a flat group is not known"),
        (SPLIT, DDP, "a master of bf16+16 is a bf16 parameter and its remainder. Expected bf16 parameters"),
    ],
)
def test_refuses_aloud(tmp_path: Path, update: str, arguments: list[str], sentence: str) -> None:
    _prepare(tmp_path, update)
    done = train(tmp_path, *TINY, *arguments, "--policy", "p.yaml", "--nproc", "1", "--steps", "2", "--out", "run")
    assert done.returncode == 2
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("update", "read"),
    [
        ("{momentum: {format: e4m3, block: 128, expand: true}, variance: E4M3/64}", ("e4m3/128/expand", "e4m3/64")),
        ("{momentum: DYNAMIC8/256, variance: float8_e4m3fn/128}", ("dynamic8/256", "e4m3/128")),
        ("{momentum: {format: bf16}}", ("bf16", "fp32")),
    ],
)
def test_blocks_of_moments_are_read(tmp_path: Path, update: str, read: tuple[str, str]) -> None:
    _prepare(tmp_path, update)
    found = load_policy(tmp_path / "p.yaml").update
    assert (found.momentum, found.variance) == read
    assert (found.formats().momentum, found.formats().variance) == read


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        ("{momentum: {format: dynamic8, block: 255}}", "dynamic8/255 is no state with blocks"),
        (
            "{momentum: {format: e4m3, blok: 2}}",
            'momentum.blok: "blok" is no key of a moment. Did you mean "block"',
        ),
        ("{momentum: {format: e4m3, expand: true}}", "expand is true or false, and needs a block"),
        ("{variance: {block: 128}}", "a moment has no format"),
    ],
)
def test_what_is_no_moment_is_refused(tmp_path: Path, update: str, sentence: str) -> None:
    _prepare(tmp_path, update)
    with pytest.raises(PolicyError, match=sentence):
        load_policy(tmp_path / "p.yaml")

"""Every benchmark runs at its smallest size, one round, and prints its tables: figures are looked at by people."""

import itertools
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import beside_busy
from benchmarks._number_rows import cast_rows, gemm_rows
from benchmarks.training_step import Shape
from launch.commands.bench import find_benchmarks

ONCE = ["--rounds", "1"]
ONE_THREAD = [*ONCE, "--threads", "1"]
TINY_LLAMA = [*ONE_THREAD, "--width", "64", "--layers", "1", "--batch", "1", "--length", "8"]
SMALLEST: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "beside_busy": ([*ONCE, "--steps", "1"], {"_worker": lambda _: 2.0, "_loop": lambda _: 1.0}, "beside one"),
    "compile_scaling": ([*ONCE, "--layers", "1", "2"], {}, "| ms by leaves |"),
    "fusion": ([*ONE_THREAD, "--rows", "4"], {"POLICIES": ("int8",), "WIDTHS": (32,), "CHANNELS": (4,)}, "batch norm"),
    "numerics": (
        [*ONE_THREAD, "--size", "16"],
        {
            "SIDE": 64,
            "GEMMS": ((32, 64, 32),),
            "cast_rows": lambda size: itertools.islice(cast_rows(size), 1),
            "gemm_rows": lambda size: dict(itertools.islice(gemm_rows(16).items(), 12)),
        },
        "casts of",
    ),
    "cliffs": (
        [*ONE_THREAD, "--rows", "tiny", "--columns", "hfp8-1-6-9", "--markdown"],
        {"ROWS": {"tiny": lambda: (nn.Conv2d(3, 4, 3), torch.randn(1, 3, 6, 6))}},
        "tiny",
    ),
    "memory": (
        [*ONCE, "--rows", "8", "--layers", "1", "--width", "16", "--no-joint"],
        {"CASES": ("fp32", "hfp8 codes")},
        "hfp8 codes",
    ),
    "recipes": ([*ONE_THREAD, "hfp8", "hopper-fp8"], {"SHAPE": Shape("smallest", 64, 1, 1, 8)}, "hopper-fp8"),
    "telemetry": ([*ONE_THREAD, "--sample", "256"], {}, "every=50"),
    "delayed_scales": (
        ONE_THREAD,
        {"SIZE": 64, "SHAPE": Shape("smallest", 64, 1, 1, 8)},
        "te-delayed",
    ),
    "optimizers": ([*ONE_THREAD, "--size", "100"], {}, "bytes a parameter"),
    "small_calls": ([*ONE_THREAD, "--policies", "hfp8"], {"SIZES": ((2, 8, 8),), "CALLS": 2}, "inference"),
    "torch_compile": ([*TINY_LLAMA, "--only", "op by op"], {}, "joint, op by op"),
    "training_step": (ONE_THREAD, {"SHAPES": (Shape("smallest", 64, 1, 1, 8),)}, "where the time goes"),
    "weight_cache": (
        [*ONE_THREAD, "--policies", "fp8-rowwise"],
        {"WIDTH": 64, "LAYERS": 1, "ROWS": 1, "CONTEXT": 8, "WEIGHTS": ((64, 64),)},
        "micro-batches",
    ),
}
"""Name -> arguments, names of the module that are smaller here, and what is printed."""


@pytest.fixture(autouse=True)
def _threads_and_random_numbers_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def _run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    import_module(f"benchmarks.{name}").main()


@pytest.mark.parametrize("name", SMALLEST)
def test_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, smaller, printed = SMALLEST[name]
    for attribute, value in smaller.items():
        monkeypatch.setattr(f"benchmarks.{name}.{attribute}", value)
    _run(name, arguments, monkeypatch)
    assert printed in capsys.readouterr().out


def test_no_benchmark_is_left_out() -> None:
    assert find_benchmarks().keys() == SMALLEST.keys()


@pytest.mark.parametrize("contender", [beside_busy._worker, beside_busy._loop])
def test_what_runs_beside_a_busy_process_runs(contender: Any) -> None:
    assert contender(1) > 0


@pytest.mark.slow
def test_every_contender_of_torch_compile_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run("torch_compile", TINY_LLAMA, monkeypatch)
    said = capsys.readouterr().out
    assert all(name in said for name in ("original, compiled", "lpcompile, compiled", "joint, Inductor", "torchao"))

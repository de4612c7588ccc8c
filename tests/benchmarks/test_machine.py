"""The state of the machine beside every table: measured where it can be, and said where it cannot."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import _machine
from benchmarks._machine import Machine, machine


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    machine.cache_clear()
    yield
    machine.cache_clear()


@pytest.mark.skipif(_machine._library() is None, reason="no C++ compiler on this machine")
def test_all_of_it_is_measured() -> None:
    before = torch.get_num_threads()
    found = machine(1, turns=1)
    assert torch.get_num_threads() == before
    assert found.threads == 1
    assert found.read_gb_s > 0
    assert found.fp32_gflops > 0
    assert list(found.peaks) == ["fp32", "bf16", "int8"]
    assert all(rate >= 0 for rate in found.peaks.values())
    assert machine(1, turns=1) is found


def test_one_core_has_no_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert machine(1, turns=1).round_trip_ns == 0


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "_library", lambda: None)
    found = machine(1, turns=1)
    assert found.peaks == {}
    assert found.fp32_gflops > 0
    assert "without a C++ compiler" in str(found)
    assert "not measured" in str(found)


def test_a_unit_that_is_not_there_is_named() -> None:
    text = str(Machine(2, 198.4, 50.2, {"fp32": 513.0, "bf16": 0.0, "int8": 1900.0}, 213.0, None))
    assert text.splitlines() == [
        "machine, 2 threads: core to core and back 198 ns, read 50 GB/s",
        "units' peaks, GFLOP/s: fp32 513, bf16 none, int8 1900",
        "fp32 product of 1024: torch.mm 213, oneDNN none",
    ]

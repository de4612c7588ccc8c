"""Claims: two workers train a GPT on real text under hfp8 as well as in fp32, and send a quarter of the bytes.

`passes` is the check. Runs that are broken on purpose must fail it, else it says nothing.

    python -m pytest tests/launch/test_claims.py -s      # also prints a line for each run: loss, bytes, time
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import pytest

from tests.multiprocess import free_port

pytestmark = pytest.mark.timeout(900)  # without a compiler casts are many operations
ROOT = Path(__file__).resolve().parents[2]
GAP = 0.01  # of fp32's validation loss
BYTES = 0.27  # of fp32's gradient bytes: a code is a quarter, scales and biases are the rest
CHANCE = 0.001  # by how much 1e-6 on the weights may move the validation loss: a tenth of GAP
CONTROLS = ("zeroed", "swapped", "unscaled")
GEMMS = 27  # FWD, BWD and GRAD of four linear layers in each of two blocks, and of the head

# hfp8 with gradients in 1-4-3, whose range of 2^-13 to 30 they do not reach without a loss scale.
UNSCALED = """
version: 1
name: unscaled
rules:
  - match: {op: linear, position: [first, last]}
    fwd: {x: bf16, w: bf16}
    bwd: {dy: bf16, w: bf16}
    grad: {dy: bf16, x: bf16}
  - match: {op: linear}
    fwd: {x: hfp8-143, w: hfp8-143}
    bwd: {dy: hfp8-143, w: hfp8-143}
    grad: {dy: hfp8-143, x: hfp8-143}
loss_scale: {kind: none}
wire: {format: e4m3, block: 256}
"""


@dataclass(frozen=True)
class Outcome:
    """What one run came to. Losses in nats per byte; bytes are those that rank 0 sent, step by step."""

    engine: str
    policy: str
    variant: str
    parameters: int
    validation: float
    bigram: float
    skipped: int
    counted: list[int]
    predicted: list[int]
    parameter_bytes: list[int]
    gemms: int
    gemms_as_asked: int
    swaps: int
    seconds: float

    def __str__(self) -> str:
        gradients, parameters = mean(self.counted), mean(self.parameter_bytes)
        return (
            f"{self.engine:17} {self.variant:9} validation {self.validation:.4f} (bigram {self.bigram:.4f})  "
            f"bytes a step: gradients {gradients:.0f} + parameter gathers {parameters:.0f} = "
            f"{gradients + parameters:.0f}  GEMMs {self.gemms_as_asked}/{self.gemms}  {self.seconds:.1f} s"
        )


Train = Callable[..., list[Outcome]]


def passes(low: Outcome, high: Outcome) -> list[str]:
    """What is wrong with a low-precision run beside the fp32 run of the same seed, steps and engine; [] is a pass."""
    complaints = []
    for run in (low, high):
        if not run.validation < run.bigram:
            complaints.append(f"validation loss of {run.variant}: {run.validation:.4f}, bigram {run.bigram:.4f}")
        if run.predicted != run.counted or min(run.counted) == 0:
            complaints.append(f"bytes of {run.variant}: the ledger's are not those counted, or none were sent")
    gap = low.validation / high.validation - 1
    if not abs(gap) <= GAP:
        complaints.append(f"validation loss is {gap:+.2%} off fp32's")
    ratios = [sent / full for sent, full in zip(low.counted, high.counted, strict=True)]
    if not max(ratios, default=math.inf) <= BYTES:
        complaints.append(f"bytes: {max(ratios):.3f} of fp32's")
    if low.gemms != GEMMS or low.gemms_as_asked != GEMMS:
        complaints.append(f"GEMMs: {low.gemms_as_asked} of {low.gemms} as asked")
    return complaints


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(engine, variant, ...) -> their outcomes; a variant runs once, and those of one call share two processes."""
    folder = tmp_path_factory.mktemp("claims")
    (folder / "unscaled.yaml").write_text(UNSCALED)
    known: dict[tuple[str, str], Outcome] = {}

    def run(engine: str, *variants: str) -> list[Outcome]:
        missing = [variant for variant in variants if (engine, variant) not in known]
        for outcome in _run_pair(folder, engine, missing) if missing else []:
            known[engine, outcome.variant] = outcome
            print(f"\n{outcome}", end="")
        return [known[engine, variant] for variant in variants]

    return run


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        "deepspeed:2",
        *(pytest.param(f"deepspeed:{stage}", marks=pytest.mark.slow) for stage in (0, 1, 3)),
    ],
)
def test_hfp8_trains_as_fp32_does_on_a_quarter_of_the_bytes(train: Train, engine: str) -> None:
    high, low = train(engine, "fp32", "hfp8")
    assert passes(low, high) == []
    assert low.parameters == high.parameters > 400_000
    assert low.parameter_bytes == high.parameter_bytes
    assert (sum(low.parameter_bytes) > 0) == (engine in ("deepspeed:1", "deepspeed:2", "deepspeed:3"))


def test_the_outcome_is_not_chance(train: Train) -> None:
    """In a chaotic run 1 % would be noise, and the check would pass or fail by luck."""
    high, perturbed = train("ddp", "fp32", "perturbed")
    assert perturbed.validation != high.validation
    assert abs(perturbed.validation / high.validation - 1) < CHANCE


@pytest.mark.parametrize("engine", ["ddp", pytest.param("deepspeed:2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("control", CONTROLS)
def test_a_broken_run_fails_the_check(train: Train, engine: str, control: str) -> None:
    """By its loss alone: the bytes and the certificate of a run whose numbers are wrong are in order."""
    outcomes = dict(zip(("fp32", *CONTROLS), train(engine, "fp32", *CONTROLS), strict=True))
    broken, high = outcomes[control], outcomes["fp32"]
    complaints = passes(broken, high)
    assert any("off fp32's" in complaint for complaint in complaints)
    assert all(complaint.startswith("validation loss") for complaint in complaints)
    assert broken.swaps == (len(broken.counted) if control == "swapped" else 0)


def _run_pair(folder: Path, engine: str, variants: list[str]) -> list[Outcome]:
    port = free_port()
    script = Path(__file__).with_name("claims_worker.py")
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), engine, *variants],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    return [Outcome(**told) for told in json.loads(outputs[0][0].splitlines()[-1]).values()]

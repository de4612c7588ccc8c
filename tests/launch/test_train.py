"""Training with 2 processes on gloo: resume is bit-exact, overflow is everybody's, a worker's error is one sentence."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import run
from launch.training.checksums import NAME, checksum, write_checksums
from tests.launch.kills import workers_of
from tests.multiprocess import free_port

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TINY = [
    *["--data", "text.txt", "--layers", "2", "--width", "64", "--heads", "2", "--context", "32", "--batch", "4"],
    *["--warmup", "2", "--eval-every", "4", "--device", "cpu", "--timeout", "60"],
]
DDP, ZERO = ["--engine", "ddp"], ["--engine", "deepspeed", "--zero-stage"]


@pytest.fixture(autouse=True)
def _a_short_text(tmp_path: Path) -> None:
    """20 kB of words drawn from a small vocabulary: quickly validated, quickly learned."""
    draw = random.Random(0)
    words = ["matrix", "kernel", "gradient", "format", "scale", "round", "the", "of", "a", "is"]
    (tmp_path / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(3300)))


def train(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "launch", "train", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def succeed(folder: Path, *arguments: str) -> str:
    done = train(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_role_changes_at_a_share_of_the_run_and_evaluation_has_a_policy_of_its_own(tmp_path: Path) -> None:
    later, whole = {"steps": "{from_step: 2, fwd: bf16}", "share": "{from_step: 50%, fwd: bf16}"}, {}
    for name, phase in {
        **later,
        "none": "{from_step: 9, fwd: bf16}",
        "evaluated": "{from_step: 50%, fwd: bf16}",
    }.items():
        evaluate = "evaluate: fp32\n" if name == "evaluated" else ""
        (tmp_path / f"{name}.yaml").write_text(f"extends: [hfp8]\nschedule: [{{from_step: 0}}, {phase}]\n{evaluate}")
        succeed(tmp_path, *TINY, *DDP, "--policy", f"{name}.yaml", "--nproc", "1", "--steps", "4", "--out", name)
        whole[name] = metrics(tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["gemms_as_asked"] == summary["gemms"]
    losses = {name: [line["loss"] for line in lines] for name, lines in whole.items()}
    assert losses["share"] == losses["steps"] == losses["evaluated"]
    assert losses["none"][:2] == losses["share"][:2]
    assert losses["none"][2] != losses["share"][2]
    validations = [[line.get("validation") for line in whole[name]] for name in ("share", "evaluated")]
    assert validations[0] != validations[1]


ENGINES = [
    pytest.param(DDP, id="ddp"),
    pytest.param([*ZERO, "2"], id="zero2"),
    *(pytest.param([*ZERO, stage], id=f"zero{stage}", marks=pytest.mark.slow) for stage in "013"),
    pytest.param([*DDP, "--dtype", "bf16", "--grad-accumulation", "2"], id="ddp-bf16", marks=pytest.mark.slow),
    *(
        pytest.param(
            [*ZERO, stage, "--dtype", "bf16", "--grad-accumulation", "2"],
            id=f"zero{stage}-bf16",
            marks=pytest.mark.slow,
        )
        for stage in "0123"
    ),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bit_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: list[str]
) -> None:
    whole = ["--policy", "hfp8", "--nproc", "2", "--steps", "8", "--save-every", "4", "--out", "whole"]
    succeed(tmp_path, *TINY, *engine, *whole)
    printed = succeed(tmp_path, "--resume", "whole/checkpoints/step-000004", "--out", "half")
    expected, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "half")
    keys = ("step", "loss", "validation", "loss_scale", "grad_norm", "gradient_bytes")
    assert [[step[key] for key in keys] for step in resumed] == [[step[key] for key in keys] for step in expected[4:]]
    assert resumed[-1]["loss"] < expected[0]["loss"]
    assert all(step["wire_agrees"] for step in expected + resumed)
    assert sum(step["gradient_bytes"] for step in expected) > 0
    assert expected[-1]["grad_norm"] > 0

    summary = json.loads((tmp_path / "half" / "summary.json").read_text())
    assert summary["gemms_as_asked"] == summary["gemms"] > 0
    assert summary["gradient_bytes_fp32"] > 1.5 * summary["gradient_bytes"]
    assert "byte-bigram baseline" in printed
    for file in ("certificate.txt", "certificate.json", "loss.png", "tensorboard", "checkpoints/latest", "run.yaml"):
        assert (tmp_path / "half" / file).exists()
    assert not list((tmp_path / "whole" / "checkpoints").glob("*.tmp"))

    shutil.copy(tmp_path / "text.txt", tmp_path / "same.txt")
    monkeypatch.chdir(tmp_path)
    assert run(["train", "--resume", "whole/checkpoints/step-000004", "--data", "same.txt", "--nproc", "7"]) == 2
    assert "written by another number of ranks" in capsys.readouterr().err, "the same bytes under another path"
    (tmp_path / "other.txt").write_text((tmp_path / "text.txt").read_text()[::-1])
    for arguments, sentence in (
        (["--data", "other.txt"], "was trained on another corpus"),
        (["--policy", "fp32"], "was trained under another policy"),
        (["--width", "32"], "--width: this is another model than the checkpoint's"),
        (["--nproc", "1"], "written by another number of ranks"),
        (["--steps", "8"], "past the end of the run"),
    ):
        assert run(["train", "--resume", "whole", *arguments]) == 2
        told = capsys.readouterr()
        assert sentence in told.err
        assert told.out == ""
        assert told.err.count("\n") == 1


def overflow(folder: Path, *engines: str) -> dict[str, Any]:
    port = free_port()
    script = Path(__file__).with_name("overflow_worker.py")
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), *engines],
            env={**ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    told: dict[str, Any] = json.loads(outputs[0][0].splitlines()[-1])
    return told


@pytest.mark.parametrize(
    "engines",
    [
        pytest.param(["ddp", "deepspeed:2"], id="ddp,zero2"),
        pytest.param(["deepspeed:0", "deepspeed:1", "deepspeed:3"], id="zero0,1,3", marks=pytest.mark.slow),
    ],
)
def test_overflow_of_one_rank_skips_the_step_on_all(tmp_path: Path, engines: list[str]) -> None:
    for steps in overflow(tmp_path, *engines).values():
        assert [step["skipped"] for step in steps] == [False, True, False]
        assert [step["overflowed"] for step in steps] == ["", "rank 1: transformer.wte grad", ""]
        assert [step["clock"] for step in steps] == [1, 1, 2], "a step that was skipped moves no clock"
        assert steps[1]["lr"] == steps[2]["lr"] == 2 * steps[0]["lr"], "nor the learning rate"
        for step in steps:
            assert step["ranks"][0] == step["ranks"][1]
        (scale0, _, loss0, _), (scale1, count1, loss1, _), (_, _, loss2, _) = (step["ranks"][0] for step in steps)
        assert scale1 == scale0 / 2
        assert count1 == 1
        assert loss1 == loss0, "the weights changed in a skipped step"
        assert loss2 < loss1


def test_compare_under_an_overflowing_scale(tmp_path: Path) -> None:
    """A loss scale at the edge of fp32 backs off until steps are clean; both runs stand in one table."""
    (tmp_path / "edge.yaml").write_text(
        "version: 1\nname: edge\nrules:\n  - match: {op: linear}\n    fwd: {x: bf16, w: bf16}\n"
        f"loss_scale: {{kind: dynamic, init: {2.0**127}, backoff: 0.0625}}\n"
    )
    arguments = [*TINY, *DDP, "--policy", "edge.yaml", "--compare", "fp32", "--steps", "6", "--out", "edge"]
    printed = succeed(tmp_path, *arguments)
    steps = metrics(tmp_path / "edge")
    assert [step["skipped"] for step in steps][:1] == [True]
    assert not steps[-1]["skipped"]
    told = "edge: step 1 skipped: a gradient overflowed, first in transformer.h.1.mlp.c_proj grad; loss scale"
    assert told in printed
    assert "difference" in printed
    assert (tmp_path / "edge" / "compare-fp32" / "summary.json").is_file()


def test_a_worker_error_is_one_sentence(tmp_path: Path) -> None:
    """strict: the parent cannot know which GEMMs would be refused; the worker's sentence is the parent's."""
    (tmp_path / "typo.yaml").write_text(
        "version: 1\nname: typo\nrules:\n  - match: {name: no_such_layer}\n    fwd: {x: bf16, w: bf16}\n"
    )
    done = train(tmp_path, *TINY, *DDP, "--policy", "typo.yaml", "--strict", "--out", "run")
    assert done.returncode == 2
    lines = done.stderr.splitlines()  # packages that are there may say something on import, before
    assert [line for line in lines if "no_such_layer" in line] == lines[-1:]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_torchrun_prints_one_sentence_or_one_table(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launch"]

    def start(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [*torchrun, "train", *TINY, *DDP, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    good = start("--policy", "hfp8", "--steps", "3")
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("byte-bigram baseline") == 1
    assert len(list((tmp_path / "runs").iterdir())) == 1
    bad = start("--policy", "hfp9")
    assert bad.returncode != 0
    assert len([line for line in bad.stderr.splitlines() if line.startswith('"hfp9" is neither')]) == 1
    taken = start("--policy", "fp32", "--out", "runs")
    assert taken.stderr.count("--out runs: this folder is not empty") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", [DDP, [*ZERO, "2"]], ids=["ddp", "zero2"])
def test_a_lost_worker_is_restarted_from_the_latest_checkpoint(tmp_path: Path, engine: list[str]) -> None:
    arguments = [*TINY, *engine, "--policy", "hfp8", "--nproc", "2", "--steps", "60", "--save-every", "5"]
    succeed(tmp_path, *arguments, "--out", "calm")
    command = [sys.executable, "-m", "launch", "train", *arguments, "--out", "storm", "--max-restarts", "2"]
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log)
        os.kill(_a_worker_of(parent, tmp_path / "storm"), signal.SIGKILL)
        assert parent.wait() == 0, (tmp_path / "log").read_text()
    calm, storm = metrics(tmp_path / "calm"), metrics(tmp_path / "storm")
    assert [step["step"] for step in storm] == list(range(1, 61))
    assert [step["loss"] for step in storm] == [step["loss"] for step in calm]


@pytest.mark.slow
def test_a_hung_worker_ends_the_run(tmp_path: Path) -> None:
    """DeepSpeed's own groups wait 30 minutes unless they are told the run's timeout."""
    arguments = [*TINY, *ZERO, "2", "--policy", "hfp8", "--nproc", "2", "--steps", "100000", "--out", "hung"]
    command = [sys.executable, "-m", "launch", "train", *arguments, "--timeout", "8", "--save-every", "5"]
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log)
        victim = _a_worker_of(parent, tmp_path / "hung")
        os.kill(victim, signal.SIGSTOP)
        try:
            assert parent.wait(timeout=120) == 1
        finally:
            if Path(f"/proc/{victim}").exists():
                os.kill(victim, signal.SIGCONT)
    told = (tmp_path / "log").read_text()
    assert "is frozen: no sign of life" in told.splitlines()[-1]
    assert "Expected an answer in 8 s (--timeout)" in told.splitlines()[-1]
    assert "lpcompile train --resume" in told.splitlines()[-1]


def _a_worker_of(parent: "subprocess.Popen[bytes]", run: Path) -> int:
    """The pid of one worker, once the run has written a checkpoint."""
    while not (run / "checkpoints" / "latest").exists():
        time.sleep(0.02)
        assert parent.poll() is None
    return workers_of(parent.pid)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param(DDP, id="ddp"), pytest.param([*ZERO, "2"], id="zero2")])
def test_a_run_by_joint_graphs_has_the_losses_of_eager_code(engine: list[str], tmp_path: Path) -> None:
    """Run op by op: bit for bit, two micro-batches a step; the summary counts what was captured."""
    for capture in ("eager", "joint"):
        more = ["--nproc", "2", "--steps", "5", "--grad-accumulation", "2", "--capture", capture, "--out", capture]
        succeed(tmp_path, *TINY, *engine, *more)
    eager, joint = (metrics(tmp_path / capture) for capture in ("eager", "joint"))
    for name in ("loss", "grad_norm", "validation", "gradient_bytes"):
        assert [step[name] for step in joint] == [step[name] for step in eager]
    summary = json.loads((tmp_path / "joint" / "summary.json").read_text())
    assert summary["graphs"] >= 2
    assert summary["products_in_graphs"] >= 27 + 9  # three roles in training, FWD in evaluation


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_hostile_shard_with_a_checksum_of_its_own_does_not_run(tmp_path: Path, name: str) -> None:
    succeed(tmp_path, *TINY, *ZERO, "2", "--nproc", "2", "--steps", "2", "--out", "run")
    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    file = saved / "engine" / name
    torch.save({**torch.load(file, weights_only=False), "more": _Hostile(tmp_path / "ran")}, file)
    write_checksums(saved, {**json.loads((saved / NAME).read_text()), f"engine/{name}": checksum(file)})
    done = train(tmp_path, "--resume", "run", "--steps", "4", "--out", "more")
    assert done.returncode == 2
    assert "this checkpoint cannot be loaded. Got posix.mkdir, where only" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


def test_zero_3_is_refused_by_joint_graphs(tmp_path: Path) -> None:
    done = train(tmp_path, *TINY, *ZERO, "3", "--capture", "joint")
    assert done.returncode != 0
    assert "--capture eager" in done.stdout + done.stderr

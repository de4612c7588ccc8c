"""Image classifiers by the same trainer: resume is bit-exact under every engine, and two ranks equal a loop by hand."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from launch.cli import run
from launch.training.config import RunConfig
from launch.training.dataset import load_dataset
from launch.training.images.packaged import is_installed
from launch.training.models.build import build_model
from launch.training.trainer import Run
from launch.training.watch import Watch
from launch.training.world import World, lone_world
from lpcompile import load_policy
from tests.launch.test_train import DDP, ZERO, metrics, succeed
from tests.machine_facts import needs_kernels
from tests.multiprocess import run_ranks

pytestmark = pytest.mark.skipif(not is_installed("digits"), reason="scikit-learn is not installed")
TINY = [
    *["--model", "mobilenet", "--data", "digits", "--layers", "2", "--batch", "8", "--policy", "hfp8", "--warmup", "2"],
    *["--steps", "8", "--save-every", "4", "--eval-every", "4", "--device", "cpu", "--timeout", "60"],
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the ranks that results are compared with: two threads add a batch norm's gradients in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param([*DDP, "--nproc", "2"], id="ddp"),
        pytest.param(["--engine", "none"], id="none"),
        pytest.param([*ZERO, "2", "--nproc", "2"], id="zero2", marks=pytest.mark.slow),
        *(pytest.param([*ZERO, each, "--nproc", "2"], id=f"zero{each}", marks=pytest.mark.slow) for each in "013"),
        pytest.param(
            [*DDP, "--nproc", "2", "--dtype", "bf16", "--grad-accumulation", "2"], id="ddp-bf16", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--engine", "none", "--dtype", "bf16", "--augment", "crop-flip", "--optimizer", "sgd"],
            id="none-bf16-augmented",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resume_is_bit_exact(tmp_path: Path, engine: list[str]) -> None:
    succeed(tmp_path, *TINY, *engine, "--out", "whole")
    printed = succeed(tmp_path, "--resume", "whole/checkpoints/step-000004", "--out", "half")
    expected, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "half")
    keys = ("step", "loss", "validation", "accuracy", "loss_scale", "grad_norm", "gradient_bytes")
    assert [[step[key] for key in keys] for step in resumed] == [[step[key] for key in keys] for step in expected[4:]]
    assert all(step["wire_agrees"] for step in expected + resumed)
    assert 0 < expected[-1]["accuracy"] <= 1
    summary = json.loads((tmp_path / "half" / "summary.json").read_text())
    assert summary["gemms_as_asked"] == summary["gemms"] > 0
    assert (summary["unit"], summary["bigram"], summary["validation_per_byte"]) == ("image", None, None)
    assert summary["accuracy"] == expected[-1]["accuracy"]
    assert "final validation accuracy" in printed
    assert "images/s" in printed
    assert "bigram" not in printed
    assert "tokens" not in printed


def test_another_data_set_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed(tmp_path, *TINY, "--engine", "none", "--steps", "2", "--warmup", "0", "--out", "whole")
    for arguments, sentence in (
        (["--augment", "crop-flip"], "--augment: this is another run than the checkpoint's"),
        (["--model", "resnet"], "--model: this is another model than the checkpoint's"),
        *([(["--data", "mnist"], "was trained on another corpus")] if is_installed("mnist") else []),
    ):
        assert run(["train", "--resume", "whole", "--steps", "9", *arguments]) == 2
        assert sentence in capsys.readouterr().err


BASE = RunConfig(
    model="resnet", data="digits", layers=2, width=8, batch=8, steps=4, warmup=0, schedule="constant", clip=0,
    eval_every=0, device="cpu", engine="ddp", policy="fp32", timeout=60, lr=1e-2, weight_decay=0.0,
)  # fmt: skip


def _train(rank: int, world: int, folder: str, config: RunConfig) -> dict[str, Any]:
    here = World(rank, world, rank, torch.device("cpu"), 0, Watch(rank, world))
    trained = Run(config, load_policy(config.policy), Path(folder), here)
    steps = [trained.step(step) for step in range(config.steps)]
    state = {name: each.numpy() for name, each in _plain(trained.model).items()}  # a tensor would need this process
    return {"losses": [step.loss for step in steps], "state": state, "end": steps[-1].validation}


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.state_dict().items()}


def _by_hand(config: RunConfig, world: int) -> dict[str, Any]:
    """The same in one process: a copy of the model per rank, gradients and running statistics averaged."""
    data = load_dataset(config)
    model = build_model(config, **data.sizes)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=0.0
    )
    losses = []
    for step in range(config.steps):
        ranks = [copy.deepcopy(model) for _ in range(world)]
        of_ranks = []
        for rank, each in enumerate(ranks):
            x, y = data.batch(config, step, 0, rank, world)
            loss = cross_entropy(each(pixel_values=x).logits, y)
            loss.backward()
            of_ranks.append(loss.item())
        for parameter, *others in zip(model.parameters(), *(each.parameters() for each in ranks)):
            parameter.grad = torch.stack([other.grad for other in others]).mean(0)
        optimizer.step()
        for buffer, *others in zip(model.buffers(), *(each.buffers() for each in ranks)):
            buffer.copy_(torch.stack(others).double().mean(0))
        losses.append(sum(of_ranks) / world)
    model.eval()
    with torch.no_grad():
        whole = [(x, y) for x, y, _ in data.validation_batches(config.model_copy(update={"batch": 1396}), 0, 1)]
        end = cross_entropy(model(pixel_values=whole[0][0]).logits, whole[0][1]).item()
    return {"losses": losses, "state": _plain(model), "end": end}


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_equal_a_loop_by_hand(tmp_path: Path, world: int) -> None:
    found, expected = run_ranks(_train, world, str(tmp_path), BASE), _by_hand(BASE, world)
    for of_rank in found:
        assert of_rank["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert of_rank["end"] == pytest.approx(expected["end"], rel=1e-4)
        for name, array in of_rank["state"].items():
            assert (array == found[0]["state"][name]).all(), f"{name} differs between ranks"
            torch.testing.assert_close(torch.from_numpy(array), expected["state"][name], atol=2e-4, rtol=1e-3)


def test_no_engine_equals_ddp_of_one(tmp_path: Path) -> None:
    alone = BASE.model_copy(update={"engine": "none"})
    with lone_world(torch.device("cpu")) as world:
        trained = Run(alone, load_policy("fp32"), tmp_path, world)
        losses = [trained.step(step).loss for step in range(alone.steps)]
    (found,) = run_ranks(_train, 1, str(tmp_path), BASE)
    assert losses == found["losses"]
    assert all(
        torch.equal(each, torch.from_numpy(found["state"][name])) for name, each in _plain(trained.model).items()
    )


@needs_kernels  # sums by the reference take minutes
@pytest.mark.parametrize("model", ["resnet", "mobilenet"])
def test_a_recipe_learns_the_digits(model: str, tmp_path: Path) -> None:
    """40 steps, where guessing is right once in ten."""
    config = BASE.model_copy(update={"model": model, "engine": "none", "steps": 40, "width": 16, "batch": 32})
    with lone_world(torch.device("cpu")) as world:
        trained = Run(config, load_policy("hfp8-2019"), tmp_path, world)
        last = [trained.step(step) for step in range(config.steps)][-1]
    assert last.accuracy is not None
    assert last.accuracy > 0.6
    assert os.environ.get("WORLD_SIZE") is None, "needs no torchrun"

"""LossScaler stands for torch.amp.GradScaler, and knows of gradients that saturated; without it a policy's loss scale
is told to be unused.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lpcompile import LossScaler, attach, lpcompile
from lpcompile.api import run_state
from runtime.errors import LossScaleWarning, LpError
from tests.multiprocess import run_ranks

POLICY = """
version: 1
name: scaled
rules:
  - match: {name: "*"}
    fwd: {x: e4m3, w: e4m3}
    bwd: {dy: e5m2, w: e4m3}
    grad: {dy: e5m2, x: e4m3}
loss_scale: {kind: KIND, init: 65536, interval: 1, min: 16}
"""


def _model(folder: Path, kind: str = "dynamic") -> nn.Module:
    torch.manual_seed(0)
    file = folder / "scaled.yaml"
    file.write_text(POLICY.replace("KIND", kind))
    return lpcompile(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), file)


def _step(model: nn.Module, scaler: Any, *optimizers: torch.optim.Optimizer, factor: float = 1.0) -> None:
    loss = model(torch.ones(8, 16)).square().mean() * factor
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad()


def _bits(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_an_unused_loss_scale_is_told_once(tmp_path: Path) -> None:
    model = _model(tmp_path)
    loss = model(torch.ones(2, 16)).sum()
    with pytest.warns(LossScaleWarning, match=r"LossScaler\(model\)") as told:
        loss.backward()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(2, 16)).sum().backward()


@pytest.mark.parametrize("kind", ["dynamic", "none"])
def test_nothing_is_told_where_nothing_is_wrong(tmp_path: Path, kind: str) -> None:
    model = _model(tmp_path, kind)
    scaler = LossScaler(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _step(model, scaler, torch.optim.SGD(model.parameters(), 0.01))
    assert scaler.is_enabled() == (kind == "dynamic")


def test_compiled_code_tells_it_too(tmp_path: Path) -> None:
    model = torch.compile(_model(tmp_path), backend="aot_eager")
    with pytest.warns(LossScaleWarning):
        model(torch.ones(2, 16)).sum().backward()


def test_a_saturated_gradient_backs_off_and_skips_the_step(tmp_path: Path) -> None:
    model = _model(tmp_path)
    scaler, optimizer = LossScaler(model), torch.optim.SGD(model.parameters(), 0.01)
    attach(model, optimizer)
    before, state = _bits(model), run_state(model)
    assert state is not None
    _step(model, scaler, optimizer, factor=100.0)
    assert scaler.get_scale() == 32768
    assert all(map(torch.equal, before, _bits(model)))
    assert int(state.step) == 0, "a step that was skipped moves no clock"
    _step(model, scaler, optimizer, factor=1e-3)
    assert scaler.get_scale() == 65536
    assert not any(map(torch.equal, before, _bits(model)))
    assert int(state.step) == 1


def test_the_scale_finds_its_place_where_gradscaler_grows_for_ever(tmp_path: Path) -> None:
    scales = []
    for make in (LossScaler, lambda model: torch.amp.GradScaler("cpu", growth_interval=1)):
        model = _model(tmp_path)
        scaler, optimizer = make(model), torch.optim.SGD(model.parameters(), 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LossScaleWarning)
            for _ in range(60):
                _step(model, scaler, optimizer)
        scales.append(scaler.get_scale())
    assert 16 <= scales[0] <= 2**20
    assert scales[1] == 2.0**76


def test_the_scale_stops_at_the_least(tmp_path: Path) -> None:
    model = _model(tmp_path)
    scaler, optimizer = LossScaler(model), torch.optim.SGD(model.parameters(), 0.0)
    for _ in range(20):
        _step(model, scaler, optimizer, factor=1e9)
    assert scaler.get_scale() == 16


def test_a_static_scale_stays(tmp_path: Path) -> None:
    model = _model(tmp_path, "static")
    scaler, optimizer = LossScaler(model), torch.optim.SGD(model.parameters(), 0.01)
    before = _bits(model)
    _step(model, scaler, optimizer, factor=float("nan"))
    assert all(map(torch.equal, before, _bits(model)))
    for _ in range(3):
        _step(model, scaler, optimizer)
    assert scaler.get_scale() == 65536
    assert not any(map(torch.equal, before, _bits(model)))


def test_all_optimizers_skip_the_same_step(tmp_path: Path) -> None:
    model = _model(tmp_path)
    halves = [torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.AdamW(model[2].parameters(), 0.1)]
    scaler, before = LossScaler(model), _bits(model)
    _step(model, scaler, *halves, factor=100.0)
    assert all(map(torch.equal, before, _bits(model)))
    assert scaler.get_scale() == 32768


def test_a_fused_optimizer_skips_and_its_clock_stays(tmp_path: Path) -> None:
    model = _model(tmp_path)
    scaler, optimizer = LossScaler(model), torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    attach(model, optimizer)
    before, state = _bits(model), run_state(model)
    assert state is not None
    _step(model, scaler, optimizer, factor=100.0)
    assert all(map(torch.equal, before, _bits(model)))
    assert int(state.step) == 0
    _step(model, scaler, optimizer, factor=1e-3)
    assert int(state.step) == 1


def test_the_state_resumes(tmp_path: Path) -> None:
    model = _model(tmp_path)
    scaler, optimizer = LossScaler(model), torch.optim.SGD(model.parameters(), 0.0)
    _step(model, scaler, optimizer, factor=100.0)
    other = LossScaler(_model(tmp_path))
    other.load_state_dict(scaler.state_dict())
    assert other.get_scale() == 32768


def test_a_model_that_is_not_compiled_is_refused() -> None:
    with pytest.raises(LpError, match="not compiled"):
        LossScaler(nn.Linear(2, 2))


def test_under_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = _model(tmp_path)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = LossScaler(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    attach(model, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = _bits(model)
    for factor, scale in ((100.0, 32768), (1e-3, 65536)):
        accelerator.backward(model(torch.ones(8, 16)).square().mean() * factor)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == (factor == 100.0)
        assert accelerator.scaler.get_scale() == scale
    assert not any(map(torch.equal, before, _bits(model)))


class _Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(16), "factor": torch.tensor(100.0 if index == 0 else 1e-3)}


class _WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.body(x).square().mean() * factor.mean()}


def test_under_transformers_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    file = tmp_path / "scaled.yaml"
    file.write_text(POLICY.replace("KIND", "dynamic"))
    torch.manual_seed(0)
    model = lpcompile(_WithLoss(), file)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=_Batches())
    trainer.accelerator.scaler = scaler = LossScaler(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LossScaleWarning)
        trainer.train()
    # three clean steps and one that saturates, in whatever order they were drawn
    assert scaler.get_scale() == 65536 * 2**3 / 2


def _ranks(rank: int, world: int, folder: str) -> tuple[float, bool, float]:
    """One rank overflows and both skip; then none does."""
    model = _model(Path(folder) / str(rank))
    ddp = DistributedDataParallel(model)
    scaler, optimizer, before = LossScaler(model), torch.optim.SGD(model.parameters(), 0.01), _bits(model)
    _step(ddp, scaler, optimizer, factor=100.0 if rank == 1 else 1e-3)
    first, same = scaler.get_scale(), all(map(torch.equal, before, _bits(model)))
    _step(ddp, scaler, optimizer, factor=1e-3)
    return first, same, scaler.get_scale()


def test_ranks_skip_together(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    assert run_ranks(_ranks, 2, str(tmp_path)) == [(32768.0, True, 65536.0)] * 2


def test_steps_that_overflow_for_ever_end_in_a_sentence_with_layer_and_role(tmp_path: Path) -> None:
    """65536 backs off to 16 in 12 steps; 32 more are skipped there."""
    model = _model(tmp_path)
    scaler, optimizer = LossScaler(model), torch.optim.SGD(model.parameters(), 0.01)
    attach(model, optimizer)
    before = _bits(model)
    for _ in range(12 + 31):
        _step(model, scaler, optimizer, factor=1e30)
    assert scaler.get_scale() == 16
    with pytest.raises(LpError, match=r"the last 32 steps were all skipped.*overflow first in 2 bwd"):
        _step(model, scaler, optimizer, factor=1e30)
    assert all(torch.equal(a, b) for a, b in zip(before, _bits(model)))
    again = LossScaler(_model(tmp_path))
    for number in range(100):  # a clean step in between starts the count anew
        _step(model, again, optimizer, factor=1e30 if number % 20 else 1.0)

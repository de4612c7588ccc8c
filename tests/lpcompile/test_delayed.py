"""Delayed scales in a compiled model: what they compute, what they look at, and where their state goes."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lpcompile import Policy, advance, attach, compile_joint, load_policy, lpcompile, original_state_dict, report
from lpcompile.api import restore, run_state
from lpcompile.errors import PolicyError
from runtime.quantize.cast_memo import MEMO
from runtime.quantize.observed.quantizer import Observed
from runtime.quantize.store import quantizers_of
from tests.machine_facts import needs_kernels


def _delayed(format: str = "e4m3", **more: Any) -> dict[str, Any]:
    return {"format": format, "scale": {"rule": "delayed", "history": 4, **more}}


def _policy(x: Any = None, w: Any = None, dy: Any = None, **more: Any) -> Policy:
    """Every product, the three operands delayed unless said otherwise."""
    x, w, dy = x or _delayed(), w or _delayed(), dy or _delayed("e5m2")
    rule = {"fwd": {"x": x, "w": w}, "bwd": {"dy": dy, "w": w}, "grad": {"dy": dy, "x": x}}
    return Policy.model_validate({"name": "delayed", "rules": [{"match": {"name": "*"}, **rule}], **more})


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def _batch(step: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(16, 16, generator=torch.Generator().manual_seed(step))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if key.startswith("_lp.")}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def _quantizers(model: nn.Module) -> dict[str, Observed]:
    found = quantizers_of(model)
    assert all(isinstance(each, Observed) for each in found.values())
    return found  # type: ignore[return-value]


# What they compute, against a reference that has ml_dtypes for formats, float64 for sums and Python for histories


class _Reference:
    """One operand: values on the grid by ml_dtypes, the scale by the rule."""

    def __init__(self, dtype: Any, largest: float, history: int) -> None:
        self.dtype, self.largest, self.length = dtype, largest, history
        self.history: list[float] = []
        self.now, self.seen = 0.0, 0.0

    def cast(self, x: np.ndarray) -> np.ndarray:
        amax = float(np.abs(x).max())
        self.seen = max(self.seen, amax)
        scale = np.float32(self.now or np.float64(amax) / self.largest)
        scaled = (x.astype(np.float32) / scale).clip(-self.largest, self.largest)
        return scaled.astype(self.dtype).astype(np.float64) * float(scale)

    def end_step(self) -> None:
        self.history = [self.seen, *self.history][: self.length]
        self.now, self.seen = float(np.float32(np.float64(max(self.history)) / self.largest)), 0.0


def test_values_gradients_and_scales_are_those_of_a_reference_in_float64() -> None:
    """A linear layer, seven steps of three micro-batches whose sizes rise and fall, the largest in the first."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 12)
    model = lpcompile(nn.Sequential(layer), _policy())
    x_ref, w_ref, dy_ref = (
        _Reference(dtype, largest, 4)
        for dtype, largest in ((ml_dtypes.float8_e4m3fn, 448.0), (ml_dtypes.float8_e4m3fn, 448.0),
                               (ml_dtypes.float8_e5m2, 57344.0))
    )  # fmt: skip
    for step, size in enumerate((1.0, 8.0, 0.1, 0.1, 0.1, 0.1, 0.1)):
        layer.weight.grad = None
        wanted_dw = 0.0
        for micro in range(3):
            x = _batch(10 * step + micro, size / (1 + 3 * micro)).repeat(1, 2)[:, :24].clone().requires_grad_()
            dy = torch.randn(16, 12, generator=torch.Generator().manual_seed(micro)) * size**2 / (1 + micro)
            y = model(x)
            y.backward(dy)
            x_q, w_q = x_ref.cast(x.detach().numpy()), w_ref.cast(layer.weight.detach().numpy())
            dy_q = dy_ref.cast(dy.numpy())
            wanted_y = x_q @ w_q.T + layer.bias.detach().double().numpy()
            np.testing.assert_allclose(y.detach().double().numpy(), wanted_y, rtol=2e-5, atol=2e-5 * size)
            assert x.grad is not None
            np.testing.assert_allclose(x.grad.double().numpy(), dy_q @ w_q, rtol=2e-5, atol=2e-5 * size**2)
            wanted_dw = wanted_dw + dy_q.T @ x_q
        assert layer.weight.grad is not None
        np.testing.assert_allclose(layer.weight.grad.double().numpy(), wanted_dw, rtol=2e-5, atol=1e-4 * size**3)
        with torch.no_grad():
            layer.weight *= 1.3 if step % 2 else 0.6
        advance(model)
        for operand, reference in (("x", x_ref), ("w", w_ref), ("dy", dy_ref)):
            reference.end_step()
            quantizer = _quantizers(model)[f"0.{operand}"]
            assert float(quantizer.in_force) == reference.now, (step, operand)
            assert quantizer.get_buffer("amax_history").tolist()[: len(reference.history)] == reference.history


def _step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sigma", [1.0, 0.005])
def test_the_first_step_has_the_bits_of_current_scaling(sigma: float) -> None:
    delayed, current = lpcompile(_model(), "te-delayed"), lpcompile(_model(), "te-current")
    for model in (delayed, current):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(sigma)
    assert "have seen none and are those of the present tensor, first 0.x" in report(delayed).to_text()
    for step in range(2):  # two micro-batches: the step is not over
        assert _same(_step(delayed, _batch(step)), _step(current, _batch(step)))
    advance(delayed)
    assert "scales that follow from earlier steps: 6\n" in report(delayed).to_text()
    assert not _same(_step(delayed, _batch(2, 3.0)), _step(current, _batch(2, 3.0)))


class _Two(nn.Module):
    """The second layer runs from a later step on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.uses_two = nn.Linear(16, 16), nn.Linear(16, 16), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x) if self.uses_two else x  # type: ignore[no-any-return]


def test_a_site_reached_later_begins_with_the_present_tensor() -> None:
    model = lpcompile(_Two(), _policy())
    for step in range(3):
        _step(model, _batch(step))
        advance(model)
    assert "3 have seen none and are those of the present tensor, first two.x" in report(model).to_text()
    model.uses_two = True
    only = lpcompile(nn.Sequential(copy.deepcopy(restored(model)).two), _policy())
    hidden: list[Tensor] = []
    model.two.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    y = model(_batch(3, 5.0))
    assert torch.equal(y, only(hidden[0]))


def restored(model: nn.Module) -> Any:
    copied = copy.deepcopy(model)
    restore(copied)
    return copied


def test_operands_that_roles_cast_in_other_ways_have_scales_of_their_own() -> None:
    rule = {
        "fwd": {"x": _delayed(), "w": "bf16"},
        "bwd": {"dy": _delayed("e5m2"), "w": _delayed()},
        "grad": {"dy": _delayed("e4m3"), "x": _delayed("e5m2")},
    }
    policy = Policy.model_validate({"rules": [{"match": {"name": "*"}, **rule}]})
    model, x = lpcompile(nn.Sequential(nn.Linear(16, 8)), policy), _batch(0).requires_grad_()
    model(x).square().sum().backward()
    advance(model)
    quantizers = _quantizers(model)
    assert set(quantizers) == {"0.x", "0.w_bwd", "0.dy", "0.dy_grad", "0.x_grad"}
    amax = {key.rpartition(".")[2]: float(each.get_buffer("amax_history")[0]) for key, each in quantizers.items()}
    assert amax["x"] == amax["x_grad"] == float(x.detach().abs().max())
    assert amax["w_bwd"] == float(model[0].weight.detach().abs().max())
    assert amax["dy"] == amax["dy_grad"] > 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
        (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
        (lambda: nn.LSTM(4, 6, batch_first=True), (2, 3, 4)),
        (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 3, 8)),
    ],
)
def test_every_kind_of_layer_keeps_its_scales(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = lpcompile(layer(), _policy()), torch.randn(shape)
    grads = []
    for _ in range(2):
        model.zero_grad()
        out = model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        advance(model)
    assert all(float(each.in_force) > 0 for each in _quantizers(model).values())
    for first, second in zip(*grads):
        assert first is not None
        assert second is not None
        torch.testing.assert_close(first, second, rtol=0.2, atol=0.2 * float(first.abs().max()))


# What they look at


@pytest.mark.parametrize("kind", ["evaluation", "no gradients", "inference"])
def test_evaluation_looks_at_nothing(kind: str) -> None:
    model = lpcompile(_model(), _policy())
    _step(model, _batch(0))
    advance(model)
    before = _state(model)
    model.train(kind != "evaluation")
    modes = {"evaluation": torch.enable_grad, "no gradients": torch.no_grad, "inference": torch.inference_mode}
    with modes[kind]():
        y = model(_batch(1, 100.0))
        if kind == "evaluation":
            y.sum().backward()
        assert torch.equal(y, model(_batch(1, 100.0)))
    model.train()
    assert all(each.take_seen() == -1 for each in _quantizers(model).values())
    advance(model)
    assert _same(_state(model), before)


def test_a_step_has_the_largest_of_its_micro_batches_and_calls() -> None:
    model = lpcompile(_model(), _policy())
    batches = [_batch(0, 4.0), _batch(1), _batch(2), _batch(3)]
    for x in batches:
        (model(x).square().mean() + model(0.5 * x).square().mean()).backward()
    advance(model)
    assert float(_quantizers(model)["0.x"].get_buffer("amax_history")[0]) == max(float(x.abs().max()) for x in batches)
    assert float(_quantizers(model)["0.x"].get_buffer("amax_history")[1]) == 0


def test_a_step_that_is_skipped_leaves_no_trace() -> None:
    model = lpcompile(_model(), _policy())
    _step(model, _batch(0))
    advance(model)
    before, step = _state(model), run_state(model).step  # type: ignore[union-attr]
    _step(model, _batch(1, 1000.0))
    advance(model, skipped=True)
    assert _same(_state(model), before)
    assert run_state(model).step == step  # type: ignore[union-attr]
    x = _batch(2)
    x[0, 0] = torch.inf
    _step(model, x)
    advance(model)
    assert torch.equal(_state(model)["_lp.0.x.in_force"], before["_lp.0.x.in_force"])
    assert all(bool(each.isfinite().all()) for each in _state(model).values())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_in_a_gradient_is_an_overflow_and_growth_is_none(value: float) -> None:
    model = lpcompile(_model(), _policy(loss_scale={"kind": "dynamic"}))
    state = run_state(model)
    assert state is not None
    state.is_scaled = True
    _step(model, _batch(0))
    advance(model)
    model(_batch(1, 50.0)).square().mean().backward()
    assert not state.overflow
    dy = torch.ones(16, 8)
    dy[3, 3] = value
    model(_batch(1)).backward(dy)
    assert state.overflow
    assert state.overflowed.first() == "2 bwd"
    state.clear_overflow()
    assert state.overflowed.first() == ""


class _Region(nn.Module):
    """A region that is checkpointed, which calls a layer twice, one of its layers in evaluation mode."""

    def __init__(self, kind: str, evaluates: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.still = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.kind, self.evaluates = kind, evaluates

    def region(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(x)) * 7)
        if self.evaluates:
            self.still.eval()
        return self.still(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.kind:
            return self.region(x)
        out: Tensor = checkpoint(self.region, x, use_reentrant=self.kind == "reentrant")
        return out


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpointing_changes_no_bit_and_no_scale(kind: str, evaluates: bool) -> None:
    runs = []
    for each in ("", kind):
        model = lpcompile(_Region(each, evaluates), _policy())
        seen: list[Tensor] = []
        for step in range(3):
            model.zero_grad()
            for micro in range(2):
                x = _batch(10 * step + micro, 1.0 + step).requires_grad_()
                y = model(x)
                y.square().mean().backward()
                seen += [y.detach(), x.grad]  # type: ignore[list-item]
            seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            advance(model)
            seen += _state(model).values()
        runs.append(seen)
    assert len(runs[0]) == len(runs[1])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_what_is_recomputed_looks_at_nothing_and_has_the_scales_of_its_forward() -> None:
    """A backward after the step is over: without memory it would cast by the scales of the next step."""
    grads = []
    for kind in ("", "not reentrant"):
        model = lpcompile(_Region(kind, False), _policy(dy="fp32", w="fp32"))
        _step(model, _batch(0))
        advance(model)
        loss = model(_batch(1, 9.0)).square().mean()
        advance(model)
        before = _state(model)
        model.zero_grad()
        loss.backward()
        assert all(each.take_seen() == -1 for each in _quantizers(model).values())
        assert _same(_state(model), before)
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_checkpointing_an_input_without_gradient() -> None:
    runs = []
    for each in ("", "not reentrant"):
        model = lpcompile(nn.Sequential(_Region(each, False).twice), _policy())
        x = _batch(0)
        y = checkpoint(model, x, use_reentrant=False) if each else model(x)
        y.square().mean().backward()
        advance(model)
        runs.append([y.detach(), *[p.grad for p in model.parameters()], *_state(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.q(x) * self.k(x) + self.v(x)
        return out


def test_equal_casts_are_shared_and_states_are_not() -> None:
    model, x = lpcompile(_Attention(), _policy(dy="fp32", w="fp32")), _batch(0)
    _step(model, x)
    advance(model)
    before, again = MEMO.num_found, x.clone()
    model(again)
    assert MEMO.num_found == before + 2, "q, k and v have one scale, and cast x once"
    assert {each.take_seen() for each in _quantizers(model).values()} == {float(x.abs().max())}
    _quantizers(model)["k.x"].put_in_force(1.0)
    before = MEMO.num_found
    y = model(_batch(1))
    assert MEMO.num_found == before + 1
    alone = [lpcompile(nn.Sequential(copy.deepcopy(restored(model).get_submodule(n))), _policy(dy="fp32", w="fp32"))
             for n in "qkv"]  # fmt: skip
    for name, each in zip("qkv", alone):
        _quantizers(each)["0.x"].put_in_force(float(_quantizers(model)[f"{name}.x"].in_force))
    q, k, v = (each(_batch(1)) for each in alone)
    assert torch.equal(y, q * k + v)


@needs_kernels
def test_a_kept_cast_of_a_weight_is_of_its_scale_and_of_its_bytes() -> None:
    """Validation between micro-batches; a step, then validation, then training; weights loaded in between."""
    model, plain = lpcompile(_model(), _policy(x="fp32", dy="fp32")), lpcompile(_model(), _policy(x="fp32", dy="fp32"))
    run_state(plain).constants.watch = lambda _: None  # type: ignore[union-attr, method-assign]
    outputs: list[list[Tensor]] = [[], []]
    for each, seen in zip((model, plain), outputs):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        attach(each, optimizer)
        for step in range(4):
            for micro in range(2):
                each.train()
                y = each(_batch(step + micro))
                y.square().mean().backward()
                each.eval()
                with torch.no_grad():
                    seen += [y.detach(), each(_batch(50))]
            each.train()
            optimizer.step()
            optimizer.zero_grad()
            each.eval()
            with torch.no_grad():
                seen.append(each(_batch(51)))
            if step == 2:
                each.load_state_dict({key: 1.5 * value for key, value in each.state_dict().items()})
        seen += _state(each).values()
    assert report(model).num_kept_casts >= 2
    assert report(plain).num_kept_casts == 0
    assert all(torch.equal(a, b) for a, b in zip(*outputs))
    assert len({float(each) for each in outputs[0][-4:] if not each.dim()}) == 2


# Where the state goes


def test_state_comes_after_the_keys_of_the_model_and_an_old_checkpoint_loads() -> None:
    plain, model = _model(), lpcompile(_model(), _policy())
    keys = list(plain.state_dict())
    own = [f"_lp.{n}.{operand}.{name}" for n in (0, 2) for operand in ("x", "w", "dy")
           for name in ("in_force", "amax_history")]  # fmt: skip
    assert list(model.state_dict()) == keys + own
    assert list(original_state_dict(model)) == keys
    model.load_state_dict(plain.state_dict(), strict=True)
    restore(model)
    assert list(model.state_dict()) == keys
    assert "_ddp_params_and_buffers_to_ignore" not in vars(model)


def _train(model: nn.Module, first: int, last: int, run: nn.Module | None = None) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
    attach(model, optimizer)
    for step in range(first, last):
        for micro in range(2):
            loss = (run or model)(_batch(2 * step + micro, 1.0 + step % 3)).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped() -> None:
    whole = lpcompile(_model(), _policy())
    losses = _train(whole, 0, 8)
    first = lpcompile(_model(), _policy())
    _train(first, 0, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = lpcompile(_model(), _policy())
    second.load_state_dict(torch.load(file))
    assert _train(second, 4, 8) == losses[8:]
    assert _same(second.state_dict(), whole.state_dict())


def _pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


@pytest.mark.parametrize("copying", [copy.deepcopy, _pickled])
def test_a_copy_goes_on_by_itself(copying: Callable[[nn.Module], nn.Module]) -> None:
    model = lpcompile(_model(), _policy())
    _train(model, 0, 2)
    before = copy.deepcopy(model.state_dict())
    copied = copying(model)
    losses = _train(copied, 2, 5)
    assert _same(model.state_dict(), before)
    assert _train(model, 2, 5) == losses


@pytest.mark.parametrize("joint", [False, True])
def test_compiled_it_is_one_graph_and_no_step_compiles_anew(joint: bool) -> None:
    eager, model = lpcompile(_model(), _policy()), lpcompile(_model(), _policy())
    torch._dynamo.reset()
    if joint:
        compile_joint(model, backend="aot_eager", fullgraph=True)
        losses = [_train(each, 0, 5) for each in (eager, model)]
        assert report(model).num_graphs == 1
        assert all(row.runs_as_policy_says for row in report(model).gemms)
    else:
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        losses = [_train(eager, 0, 5), _train(model, 0, 5, compiled)]
        assert counter.frame_count == 1
    assert losses[0] == losses[1]
    assert _same(eager.state_dict(), model.state_dict())


@pytest.mark.parametrize("joint", [False, True])
def test_compiled_evaluation_looks_at_nothing(joint: bool) -> None:
    model = lpcompile(_model(), _policy())
    torch._dynamo.reset()
    run: Any = compile_joint(model, backend="aot_eager") if joint else torch.compile(model, backend="aot_eager")
    _train(model, 0, 2, run)
    before = _state(model)
    with torch.no_grad():
        run(_batch(9, 100.0))
    model.eval()
    with torch.no_grad():
        run(_batch(9, 100.0))
    model.train()
    assert all(each.take_seen() == -1 for each in _quantizers(model).values())
    assert _same(_state(model), before)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("joint", [False, True])
def test_inductor_trains_as_eager_code_does(joint: bool) -> None:
    eager, model = lpcompile(_model(), _policy()), lpcompile(_model(), _policy())
    torch._dynamo.reset()
    run: Any = compile_joint(model) if joint else torch.compile(model)
    losses = [_train(eager, 0, 3), _train(model, 0, 3, run)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    for key, value in _state(eager).items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_inference_computes_what_training_did() -> None:
    trained, x = lpcompile(_model(), _policy()), _batch(7)
    _train(trained, 0, 3)
    served = lpcompile(_model().eval(), _policy(), (x,), mode="infer")
    served.load_state_dict(trained.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(served(x), trained.eval()(x), rtol=1e-6, atol=1e-6)
    assert not report(served).unserved


def test_compiling_again_keeps_the_state() -> None:
    model = lpcompile(_model(), _policy())
    _train(model, 0, 2)
    before = _state(model)
    lpcompile(model, _policy(), (_batch(0),))
    assert _same(_state(model), before)
    with pytest.raises(TypeError):
        lpcompile(model, _policy(), (_batch(0), 1, 2))
    assert _same(_state(model), before)
    assert "_lp.0.x.in_force" in vars(model)["_ddp_params_and_buffers_to_ignore"]
    lpcompile(model, _policy(x=_delayed(history=8)))
    assert float(_quantizers(model)["0.x"].in_force) == 0


def test_the_policy_reads_prints_and_refuses() -> None:
    policy = _policy(x=_delayed(algorithm="most_recent", margin=1, per_rank=True))
    assert load_policy(policy).hash == policy.hash
    text = policy.to_yaml()
    assert "rule: delayed, history: 4, algorithm: most_recent, margin: 1, per_rank: true" in text
    grad = {"format": "fp4-radix4", "quantizer": {"kind": "grad-scale"}}
    assert "quantizer: {kind: grad-scale, rule: max-align, per_rank: false}" in _policy(dy=grad).to_yaml()
    for scale, sentence in (
        ({"rule": "delayed", "granularity": "row"}, "a delayed scale is one per tensor"),
        ({"rule": "amax", "history": 4}, 'history is set and rule is "amax"'),
        ({"rule": "delayed", "history": 0}, "history"),
        ({"rule": "delayed", "algorithm": "recent"}, 'Did you mean "most_recent"'),
        ({"rule": "delayed", "histori": 4}, 'Did you mean "history"'),
    ):
        with pytest.raises(PolicyError, match=sentence):
            _policy(x={"format": "e4m3", "scale": scale})
    with pytest.raises(PolicyError, match="makes its own scales"):
        _policy(x={"format": "mxfp8", "scale": {"rule": "delayed"}})
    with pytest.raises(PolicyError, match="grad-scale is for gradients"):
        _policy(x={"format": "e4m3", "quantizer": {"kind": "grad-scale"}})
    with pytest.raises(PolicyError, match="the quantizer is the scale"):
        _policy(dy={"format": "e4m3", "scale": {"rule": "delayed"}, "quantizer": {"kind": "grad-scale"}})
    with pytest.raises(PolicyError, match="grad-scale has no init"):
        _policy(dy={"format": "e4m3", "quantizer": {"kind": "grad-scale", "init": 2}})


@pytest.mark.parametrize("rule", ["max-align", "dalle"])
def test_a_grad_scale_follows_the_gradients_of_its_layer(rule: str) -> None:
    """Powers of two: a step with the scale fixed by hand has the same bits."""
    grad = {"format": "fp4-radix4", "quantizer": {"kind": "grad-scale", "rule": rule}}
    model = lpcompile(_model(), _policy(x="bf16", w="bf16", dy=grad))
    for step in range(4):
        _step(model, _batch(step))
        advance(model)
    scales = {name: float(each.in_force) for name, each in _quantizers(model).items()}
    assert set(scales) == {"0.dy", "2.dy"}
    got = _step(model, _batch(9))
    for name, scale in scales.items():
        assert torch.tensor(scale).log2().frac() == 0, (name, scale)
    seen = {name: each.take_seen() for name, each in _quantizers(model).items()}
    if rule == "max-align":
        assert all(16 < float(amax) / scales[name] <= 128 for name, amax in seen.items())
    assert all(bool(each.isfinite().all()) for each in got.values())
    weights = got["2.weight"] / scales["2.dy"]
    assert torch.equal(weights, weights.round()) or rule == "dalle" or bool(weights.abs().max() > 0)


def test_histories_roll_in_order() -> None:
    model = lpcompile(_model(), _policy())
    largest = []
    for step in range(6):
        x = _batch(step, 1.0 + step)
        _step(model, x)
        advance(model)
        largest.append(float(x.abs().max()))
    assert _quantizers(model)["0.x"].get_buffer("amax_history").tolist() == largest[:1:-1]
    assert all(a != b for a, b in pairwise(largest))

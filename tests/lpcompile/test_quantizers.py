"""Quantizers with state in a compiled model: what they compute and learn, and where their state goes."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lpcompile import Policy, load_policy, lp_parameters, lpcompile, original_state_dict, report
from lpcompile.api import restore
from lpcompile.errors import NotSupported, PolicyError
from lpcompile.programs import install_text, program_of
from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.manager import parse_passes, run_passes
from passes.pipelines import PASSES, PIPELINES
from runtime.quantize.store import quantizers_of
from tests.machine_facts import needs_kernels

PACT = {"format": "uint4", "quantizer": {"kind": "pact", "init": 2.0}}
PACT_SIGNED = {"format": "int4", "quantizer": {"kind": "pact", "init": 2.0}}
LSQ = {"format": "int4", "quantizer": {"kind": "lsq"}}


def _policy(x: Any = PACT, w: Any = LSQ, **more: Any) -> Policy:
    """Both operands of each product learn; gradients are fp32."""
    rule = {"fwd": {"x": x, "w": w}, "bwd": {"dy": "fp32", "w": w}, "grad": {"dy": "fp32", "x": x}}
    return Policy.model_validate({"name": "learned", "rules": [{"match": {"name": "*"}, **rule}], **more})


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def _quantized(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """round(clip(x / s)) s with derivatives as if rounding had derivative one, everything else by autograd."""
    v = x / scale
    return torch.where(v <= low, low, torch.where(v >= high, high, v + (v.round() - v).detach())) * scale


def _linear_by_hand(x: Tensor, w: Tensor, b: Tensor, clip: Tensor, step: Tensor) -> Tensor:
    """PACT of x on uint4, LSQ of w on int4, from the papers; the scale of LSQ's gradient by a trick of autograd."""
    clipped = torch.where(x >= clip, clip, torch.where(x < 0, torch.zeros_like(x), x))
    x_q = clipped + ((clipped / (clip / 15)).round() * (clip / 15) - clipped).detach()
    factor = (w.numel() * 7) ** -0.5
    step = step * factor + (step - step * factor).detach()
    return F.linear(x_q, _quantized(w, step, -7, 7), b)


def test_forward_and_every_gradient_are_those_of_the_papers() -> None:
    model = lpcompile(_model(), _policy())
    plain = _model().double()
    x = 3 * torch.randn(64, 16)
    state = quantizers_of(model)
    clips = [torch.tensor(2.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    steps = [state[f"{n}.w"].scale(x).double().requires_grad_() for n in (0, 2)]
    for step, n in zip(steps, (0, 2)):
        torch.testing.assert_close(step, 2 * plain[n].weight.abs().mean().float().double() / 7**0.5, rtol=1e-6, atol=0)
    wide, mine = x.double().requires_grad_(), x.clone().requires_grad_()
    hidden = _linear_by_hand(wide, plain[0].weight, plain[0].bias, clips[0], steps[0])
    wanted = _linear_by_hand(F.relu(hidden), plain[2].weight, plain[2].bias, clips[1], steps[1])
    got = model(mine)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    dy = torch.randn(64, 8)
    wanted.backward(dy.double())
    got.backward(dy)
    pairs = [(mine.grad, wide.grad)]
    pairs += [(model[n].weight.grad, plain[n].weight.grad) for n in (0, 2)]
    pairs += [(model[n].bias.grad, plain[n].bias.grad) for n in (0, 2)]
    learned = [state[name] for name in ("0.x", "2.x", "0.w", "2.w")]
    pairs += [(next(each.parameters()).grad, wanted.grad) for each, wanted in zip(learned, clips + steps)]
    for mine_, wanted_ in pairs:
        assert mine_ is not None
        assert wanted_ is not None
        assert wanted_.abs().max() > 0
        torch.testing.assert_close(mine_.double(), wanted_.reshape(mine_.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
        (lambda: nn.LSTM(4, 6, batch_first=True), (2, 3, 4)),
        (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 3, 8)),
    ],
)
def test_every_kind_of_layer_learns(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = lpcompile(layer(), _policy(LSQ, LSQ))
    x = torch.randn(shape)
    out = model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    parameters = lp_parameters(model)
    assert parameters
    assert all(each.grad is not None and bool(each.grad.isfinite().all()) for each in parameters)
    assert sum(each.grad.abs().item() > 0 for each in parameters if each.grad is not None) >= 2


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.q(x) * self.k(x) + self.v(x)
        return out


def test_clips_of_their_own_are_casts_of_their_own() -> None:
    """q, k and v cast one tensor with one spec; with a learned clip each, that is three casts."""
    torch.manual_seed(0)
    model, x = _Attention(), torch.randn(8, 16)
    lpcompile(model, _policy(PACT_SIGNED), (x,))
    clips = [quantizers_of(model)[f"{name}.x"] for name in "qkv"]
    with torch.no_grad():
        for clip, value in zip(clips, (0.5, 1.0, 2.0)):
            next(clip.parameters()).fill_(value)
    wanted = []
    for name, clip in zip("qkv", clips):
        scale, step = clip.scale(x), quantizers_of(model)[f"{name}.w"].scale(x)
        weight = getattr(model, name).weight.detach()
        wanted.append(F.linear((x / scale).round().clip(-7, 7) * scale, (weight / step).round().clip(-7, 7) * step))
    torch.testing.assert_close(model(x), wanted[0] * wanted[1] + wanted[2], rtol=1e-5, atol=1e-5)
    assert report(model).num_quantize_after == 6


@needs_kernels
def test_a_kept_cast_of_a_weight_is_of_its_scale() -> None:
    model = lpcompile(_model(), _policy()).eval()
    x = torch.randn(4, 16)
    with torch.no_grad():
        first = model(x)
        assert report(model).num_kept_casts == 2
        assert torch.equal(model(x), first)
        quantizers_of(model)["0.w"].get_parameter("offset").data += 0.05  # behind the parameter's version
        assert not torch.equal(model(x), first)


def test_state_comes_after_the_keys_of_the_model_and_an_old_checkpoint_loads() -> None:
    plain = _model()
    model = lpcompile(_model(), _policy())
    keys = list(plain.state_dict())
    own = ["_lp.0.x.clip", "_lp.0.w.offset", "_lp.0.w.base", "_lp.2.x.clip", "_lp.2.w.offset", "_lp.2.w.base"]
    assert list(model.state_dict()) == keys + own
    assert list(original_state_dict(model)) == keys
    model.load_state_dict(plain.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        model.load_state_dict({}, strict=True)
    plain.load_state_dict(original_state_dict(model), strict=True)
    restore(model)
    assert list(model.state_dict()) == keys


def test_a_policy_without_state_leaves_no_trace() -> None:
    model = lpcompile(_model(), "hfp8")
    assert [name for name, _ in model.named_children()] == ["0", "1", "2"]
    assert lp_parameters(model) == []


def test_a_sequential_computes_what_it_did() -> None:
    model = lpcompile(_model(), _policy())
    x = torch.randn(4, 16)
    assert torch.equal(model(x), model[2](model[1](model[0](x))))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@needs_kernels
def test_inductor_learns_what_eager_code_does() -> None:
    eager, model = (lpcompile(_model(), _policy(LSQ)) for _ in range(2))
    torch._dynamo.reset()
    losses = [_train(each, _adam(one), 0, 3) for each, one in ((eager, eager), (torch.compile(model), model))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    learned = {id(each) for each in lp_parameters(model)}
    rest = [each for each in model.parameters() if id(each) not in learned]
    groups = [{"params": rest}, {"params": lp_parameters(model), "lr": 1e-2}]
    return torch.optim.Adam(groups, lr=1e-3)


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("x", [PACT, LSQ])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(x: Any) -> None:
    whole = lpcompile(_model(), _policy(x))
    losses = _train(whole, _adam(whole), 0, 8)
    assert all(each.grad is not None for each in lp_parameters(whole))
    first = lpcompile(_model(), _policy(x))
    optimizer = _adam(first)
    _train(first, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second = lpcompile(_model(), _policy(x))
    second.load_state_dict(saved["model"])
    again = _adam(second)
    again.load_state_dict(saved["optimizer"])
    assert _train(second, again, 4, 8) == losses[4:]
    assert _same(second.state_dict(), whole.state_dict())


def _pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copying", [copy.deepcopy, _pickled, _saved])
def test_a_copy_learns_by_itself(copying: Callable[[nn.Module], nn.Module]) -> None:
    model = lpcompile(_model(), _policy(LSQ))
    _train(model, _adam(model), 0, 2)
    before = copy.deepcopy(model.state_dict())
    copied = copying(model)
    assert _same(copied.state_dict(), before)
    losses = _train(copied, _adam(copied), 2, 4)
    assert _same(model.state_dict(), before)
    assert not torch.equal(copied.state_dict()["_lp.0.w.offset"], before["_lp.0.w.offset"])
    assert _train(model, _adam(model), 2, 4) == losses


class _Checkpointed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = _model(), kind

    def forward(self, x: Tensor) -> Tensor:
        if not self.kind:
            return self.inner(x)  # type: ignore[no-any-return]
        out: Tensor = checkpoint(self.inner, x, use_reentrant=self.kind == "reentrant")
        return out


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpointing_changes_no_bit(kind: str) -> None:
    results = []
    for each in ("", kind):
        model = lpcompile(_Checkpointed(each), _policy(LSQ))
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in range(2):
            model(x).square().mean().backward()
        results.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
    assert len(results[0]) == 8
    assert _same(*results)


@pytest.mark.parametrize("x", [PACT, LSQ])
def test_compiled_it_is_one_graph_and_no_step_compiles_anew(x: Any) -> None:
    eager = lpcompile(_model(), _policy(x))
    model = lpcompile(_model(), _policy(x))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    losses = [_train(each, _adam(one), 0, 4) for each, one in ((eager, eager), (compiled, model))]
    assert counter.frame_count == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return out


@pytest.mark.parametrize("w", [LSQ, "e4m3"])
def test_inference_computes_what_training_did(w: Any) -> None:
    """A step of a weight is not one of the weight with a batch norm folded in: that norm stays."""
    torch.manual_seed(0)
    plain, x = _Normed(), torch.randn(4, 3, 8, 8)
    plain(x)
    nn.init.uniform_(plain.norm.weight, 0.1, 3)
    trained = lpcompile(copy.deepcopy(plain), _policy(LSQ, w)).eval()
    with torch.no_grad():
        wanted = trained(x)
        served = lpcompile(copy.deepcopy(plain).eval(), _policy(LSQ, w), (x,), mode="infer")
        served.load_state_dict(trained.state_dict())
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if w == LSQ else {"rtol": 0.1, "atol": 0.05}  # e4m3 of another weight
        torch.testing.assert_close(served(x), wanted, **tolerance)
    assert ("learned a scale of the weight" in report(served).to_text()) is (w == LSQ)


def test_compiling_again_keeps_what_was_learned() -> None:
    torch.manual_seed(0)
    model, x = _Attention(), torch.randn(4, 16)
    lpcompile(model, _policy(PACT_SIGNED), (x,))
    clip = quantizers_of(model)["q.x"]
    lpcompile(model, _policy(PACT_SIGNED), (torch.randn(2, 3, 16),))
    assert quantizers_of(model)["q.x"] is clip
    with pytest.raises(TypeError):
        lpcompile(model, _policy(PACT_SIGNED), (x, x, x))
    assert quantizers_of(model)["q.x"] is clip
    lpcompile(model, _policy({**PACT_SIGNED, "quantizer": {"kind": "lsq"}}))
    assert quantizers_of(model)["q.x"] is not clip


def test_text_and_certificate_name_a_quantizer_by_kind_and_site() -> None:
    model = lpcompile(_model(), _policy())
    x = torch.randn(4, 16)
    program = program_of(_model(), _policy(), (x,))
    run_passes(program, parse_passes(PIPELINES["infer"], PASSES))
    text = print_program(program)
    assert 'spec = "uint4 nearest_even pact[init=2.0]"' in text
    assert 'quantizer = "2.x"' in text
    assert print_program(parse_program(text)) == text
    rows = {(row.name, row.role): row for row in report(model).gemms}
    assert rows["2", "fwd"].lhs == "uint4 nearest_even pact[init=2.0]"
    other = install_text(_model(), text, (x,))
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_the_policy_reads_prints_and_refuses() -> None:
    policy = _policy()
    assert load_policy(policy).hash == policy.hash
    assert "quantizer: {kind: pact, init: 2.0}" in policy.to_yaml()
    with pytest.raises(NotSupported, match=r'"dorefa" is planned'):
        _policy({"format": "int4", "quantizer": {"kind": "dorefa"}})
    with pytest.raises(PolicyError, match="rule: sawb"):
        _policy({"format": "int4", "quantizer": {"kind": "sawb"}})
    with pytest.raises(PolicyError, match="is not a quantizer"):
        _policy({"format": "int4", "quantizer": {"kind": "pct"}})
    with pytest.raises(PolicyError, match="integers"):
        _policy({"format": "e4m3", "quantizer": {"kind": "pact"}})
    with pytest.raises(PolicyError, match="the quantizer is the scale"):
        _policy({"format": "int4", "scale": {"granularity": "row"}, "quantizer": {"kind": "lsq"}})


def test_a_quantizer_without_a_gradient_is_refused() -> None:
    rules = [{"match": {"name": "*"}, "fwd": {"x": "int8", "w": "int8"}, "bwd": {"dy": LSQ, "w": "int8"}}]
    model = lpcompile(_model(), Policy.model_validate({"rules": rules}))
    assert "lsq learns by a gradient" in report(model).to_text()
    rules = [{"match": {"name": "*"}, "fwd": {"x": "int8", "w": "int8"}, "grad": {"dy": "int8", "x": LSQ}}]
    model = lpcompile(_model(), Policy.model_validate({"rules": rules}))
    assert "learns by what FWD casts" in report(model).to_text()
    assert lp_parameters(model) == []


@pytest.mark.parametrize("has_examples", [True, False])
def test_lsq_on_meta_has_shapes_and_settles_where_values_come(has_examples: bool) -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(8, 8)), torch.empty(4, 8)
    lpcompile(model, _policy(LSQ), (x,) if has_examples else None)
    assert model(x).shape == (4, 8)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert model(torch.ones(4, 8)).isfinite().all()
    assert all(float(base) > 0 for name, base in model.named_buffers() if name.endswith("base"))

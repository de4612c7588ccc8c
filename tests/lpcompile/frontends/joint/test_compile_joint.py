"""The joint front end: FWD, BWD and GRAD rewritten in autograd's graph. The oracle is lpcompile() in eager code: run op
by op, every output and gradient has the same bits, step after step.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lpcompile import Policy, advance, lpcompile, report
from lpcompile.api import restore, run_state
from lpcompile.compiled import find_compiled
from lpcompile.errors import LpError, NotSupported
from lpcompile.frontends.joint.captured import Captured
from lpcompile.frontends.joint.compiling import compile_joint, remove_joint
from tests.zoo.models import ZOO, build, differences

_E4M3 = {"x": "e4m3", "w": "e4m3"}
_CASTS = {"fwd": _E4M3, "bwd": {"dy": "e5m2", "w": "e4m3"}, "grad": {"dy": "e5m2", "x": "e4m3"}}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class _Layer(nn.Module):
    """q and k of one input, a product of activations written with `@`, and a graph break on demand."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.o(torch.softmax(q @ k.transpose(-1, -2), -1) @ k)


class _Model(nn.Module):
    """checkpoints: use_reentrant of the checkpoints around the layers; None for none."""

    def __init__(self, breaks: bool = False, checkpoints: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(breaks), _Layer(breaks)])
        self.lm_head = nn.Linear(32, 48, bias=False)
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.checkpoints is None else checkpoint(layer, x, use_reentrant=self.checkpoints)
        return self.lm_head(x)


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, stride=2, groups=2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def _policy(*rules: dict[str, Any], **more: Any) -> Policy:
    return Policy.model_validate({"name": "test", "rules": rules, **more})


def _results(run: Callable[..., Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    assert x.grad is not None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def _captured(model: nn.Module) -> Captured:
    compiled = find_compiled(model)
    assert compiled is not None
    assert compiled.joint is not None
    return compiled.joint


def _compare(
    model: nn.Module,
    x: Tensor,
    policy: str | Policy,
    steps: int = 1,
    tolerance: float = 0.0,
    counts: bool = True,
    **options: Any,
) -> nn.Module:
    """Compare two micro-batches of each step with eager code; returns the model under the joint front end."""
    lpcompile(model, policy, example_inputs=(x,))
    eager = copy.deepcopy(model)
    assert compile_joint(model, backend="aot_eager", **options) is model
    for _ in range(steps):
        for _ in range(2):
            assert differences(_results(model, model, x), _results(eager, eager, x), tolerance) == []
        advance(model)
        advance(eager)
    found, expected = _calls(model), _calls(eager)
    assert not counts or all(found[site] == expected[site] for site in _captured(model).roles)
    return model


def _calls(model: nn.Module) -> dict[str, Any]:
    state = run_state(model)
    assert state is not None
    return {site: calls.by_role for site, calls in state.calls.sites.items()}


def _attention() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return _Model(), torch.randn(4, 8, 32)


_STOCHASTIC = {"format": "e4m3", "rounding": "stochastic"}
_DRAWS = {
    "fwd": {"x": _STOCHASTIC, "w": _STOCHASTIC},
    "bwd": {"dy": {"format": "e5m2", "rounding": "stochastic"}, "w": _STOCHASTIC},
    "grad": {"dy": {"format": "e5m2", "rounding": "stochastic"}, "x": "e4m3"},
}


@pytest.mark.parametrize("policy", ["fp8-rowwise", "hfp8", "int8", "bf16"])
def test_has_the_bits_of_eager_code(policy: str) -> None:
    model, x = _attention()
    captured = _captured(_compare(model, x, policy, fullgraph=True))
    assert captured.num_graphs == 1
    certificate = report(model)
    assert captured.num_products == len(certificate.gemms) == certificate.num_rewritten
    assert {(row.name, row.role) for row in certificate.gemms} == {
        (name, role) for name, roles in captured.roles.items() for role in roles
    }


@pytest.mark.parametrize("is_convolution", [False, True])
def test_where_nothing_is_cast_every_product_is_torchs_own(is_convolution: bool) -> None:
    torch.manual_seed(0)
    model, x = (_Convolutions(), torch.randn(2, 3, 8, 8)) if is_convolution else _attention()
    expected = _results(model, model, x)
    lpcompile(model, "fp32-emulated", example_inputs=(x,))
    compile_joint(model, backend="aot_eager", fullgraph=True)
    assert differences(_results(model, model, x), expected, 0.0) == []
    assert _captured(model).num_casts == 0


@pytest.mark.parametrize("policy", ["hfp8", "int8"])
def test_convolutions_have_the_bits_of_eager_code(policy: str) -> None:
    torch.manual_seed(0)
    model = _compare(_Convolutions(), torch.randn(2, 3, 8, 8), policy, fullgraph=True)
    assert {row.op for row in report(model).gemms} == {"conv2d", "linear"}
    assert _captured(model).num_products == 9


def test_products_of_activations_are_named_and_cast() -> None:
    rule = {
        "match": {"name": "layers.1.matmul_0"},
        "fwd": {"x": "e4m3", "w": "e4m3"},
        "bwd": {"dy": "e5m2", "w": "e4m3"},
    }
    model, x = _attention()
    _compare(model, x, _policy(rule), fullgraph=True)
    assert _captured(model).roles == {"layers.1.matmul_0": {"fwd", "bwd", "grad"}}


@pytest.mark.parametrize("breaks", [False, True])
def test_two_layers_of_one_class_keep_their_own_policies(breaks: bool) -> None:
    """torch.compile would let them share the graphs around a break. Around one the gradients of k are added in another
    order: 1e-5, where the other layer's policy would be off by 1e-2. Products of activations behind it have names too.
    """
    torch.manual_seed(0)
    rules = (
        {"match": {"name": "layers.0.*"}, "fwd": {"x": "bf16", "w": "bf16"}},
        {"match": {"name": "layers.1.*"}, **_CASTS},
    )
    model = _compare(_Model(breaks), torch.randn(4, 8, 32), _policy(*rules), tolerance=1e-5 if breaks else 0.0)
    captured = _captured(model)
    assert {name for name in captured.roles if name.startswith("layers.1.")} == {
        f"layers.1.{part}" for part in ("q", "k", "o", "matmul_0", "matmul_1")
    }
    assert (captured.num_graphs > 2) is breaks


def test_casts_are_shared_across_sites_and_roles() -> None:
    """Scale 1, so that FWD and GRAD cast x alike, FWD and BWD w, BWD and GRAD dy; q and k have one x."""
    torch.manual_seed(0)
    captured = _captured(_compare(_Layer(), torch.randn(4, 8, 32), _policy({"match": {"op": "linear"}, **_CASTS})))
    assert captured.num_cast_uses == 18
    assert captured.num_casts == 2 + 3 + 3  # x, w, dy


@pytest.mark.parametrize("rule", [{"match": {"op": "linear"}, **_DRAWS}, {"match": {}, **_DRAWS}])
def test_stochastic_rounding_draws_the_bits_of_eager_code_in_one_graph(rule: dict[str, Any]) -> None:
    """Each step and micro-batch its own, and nothing is compiled anew for them."""
    model, x = _attention()
    _compare(model, x, _policy(rule), steps=3, fullgraph=True)
    assert _captured(model).num_graphs == 1
    assert counters["stats"]["unique_graphs"] == 1


def test_stochastic_sums_draw_the_bits_of_eager_code() -> None:
    accumulate = {"format": "1-6-9", "chunk": 16, "rounding": "stochastic"}
    role = {"x": "e4m3", "w": "e4m3", "accumulate": accumulate}
    model = nn.Sequential(nn.Linear(32, 16))
    _compare(model, torch.randn(4, 32), _policy({"match": {"op": "linear"}, "fwd": role}), steps=2, fullgraph=True)
    assert _captured(model).num_graphs == 1


def test_each_phase_of_a_schedule_has_its_graph() -> None:
    schedule = [{"from_step": 0, "policy": "hfp8"}, {"from_step": 2, "policy": "int8"}]
    model, x = _attention()
    _compare(model, x, _policy(schedule=schedule), steps=4, fullgraph=True)
    assert _captured(model).num_graphs == 2


@pytest.mark.parametrize(("casts", "more"), [(_CASTS, {}), (_CASTS, {"loss_scale": {"kind": "dynamic"}}), (_DRAWS, {})])
def test_modules_of_fsdp_are_compiled_once(casts: dict[str, Any], more: dict[str, Any]) -> None:
    """torch.compile takes an int that it reads through a module of FSDP2 for a size, and makes a symbol of it in the
    second layer, or model, of a class: the keys by which traced code finds its scope and its state are none.
    """
    for _ in range(2):
        model, x = _attention()
        for layer in model.layers:  # type: ignore[union-attr]
            for module in layer.modules():
                module._is_fsdp_managed_module = module._fsdp_use_orig_params = True  # as fully_shard marks them
            layer.register_forward_pre_hook(torch._dynamo.disable(lambda module, args: None))
        _compare(model, x, _policy({"match": {}, **casts}, **more), steps=2)
        assert len(_captured(model).roles) == 11
        num_graphs = _captured(model).num_graphs
        _results(model, model, x)
        assert _captured(model).num_graphs == num_graphs
    assert not any("assume_constant_result" in reason for reason in counters["graph_break"])


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cell(x)[0]
        return y


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


@pytest.mark.parametrize(("kind", "num_sites"), [(_SelfAttention, 4), (_Recurrent, 2)])
def test_modules_of_several_products_are_rewritten(kind: type[nn.Module], num_sites: int) -> None:
    torch.manual_seed(0)
    model = kind()
    _compare(model, torch.randn(2, 5, 16), _policy({"match": {}, **_CASTS}), fullgraph=True)
    assert len(_captured(model).roles) == num_sites


class _Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), x, x, is_causal=True)


def test_fused_attention_that_a_policy_names_is_rewritten() -> None:
    model, x = nn.Sequential(_Fused()), torch.randn(2, 2, 8, 16)
    _compare(model, x, _policy({"match": {"op": "matmul"}, **_CASTS}), fullgraph=True)
    assert set(_captured(model).roles) == {"0.sdpa_0.qk", "0.sdpa_0.pv"}


@pytest.mark.parametrize("name", ["pact", "lsq"])
def test_quantizers_with_state_learn_as_in_eager_code(name: str) -> None:
    operand = {"format": "uint4" if name == "pact" else "int4", "quantizer": {"kind": name}}
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    rule = {"match": {"name": "2"}, "fwd": {"x": operand, "w": "int4"}}
    _compare(model, torch.randn(8, 16), _policy(rule), steps=2, fullgraph=True)
    assert _captured(model).num_graphs == 1


def test_prints_the_graph_before_and_after() -> None:
    model, x = _attention()
    shown: dict[str, str] = {}
    compile_joint(model, "fp8-rowwise", backend="aot_eager", print_graph=shown.__setitem__)
    model(x.requires_grad_()).sum().backward()
    for role in ("fwd", "bwd", "grad"):
        assert shown["before"].count(f"lp.site_{role}.default(") == 7
        assert shown["after"].count(f"lp.{role}.default(") == 7
    assert "lp.cast" not in shown["before"]
    assert "lp.site_" not in shown["after"]


def test_keys_and_class_stay_and_it_can_be_taken_away() -> None:
    model, x = _attention()
    keys, kind = list(model.state_dict()), type(model)
    compile_joint(model, "fp8-rowwise", backend="aot_eager")
    assert list(model.state_dict()) == keys
    assert isinstance(model, kind)
    twin = copy.deepcopy(model)
    assert find_compiled(twin).joint is None  # type: ignore[union-attr]
    assert differences(_results(twin, twin, x), _results(model, model, x)) == []
    assert "1 joint graph captured, 21 products rewritten" in report(model).to_text()
    remove_joint(model)
    assert counters["stats"].pop("unique_graphs") == 1
    model(x)
    assert report(model).joint == ""
    compile_joint(model, backend="aot_eager")
    restore(model)
    model(x)
    assert not counters["stats"]["unique_graphs"]


def test_what_is_not_compiled_or_is_already_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(LpError, match="was not compiled"):
        compile_joint(model)
    lpcompile(model, "hfp8")
    with pytest.raises(LpError, match="compiled already"):
        compile_joint(model, "hfp8")
    with pytest.raises(LpError, match="not a backend"):
        compile_joint(model, backend="onnx")  # type: ignore[arg-type]


def test_refuses_weights_that_zero_3_partitions() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(32, 32)), "hfp8")
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(NotSupported, match="ZeRO-3"):
        compile_joint(model)


def test_an_overflow_of_a_gradient_is_noticed() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(4, 32)
    rule = {"match": {"op": "linear"}, **_CASTS}
    compile_joint(model, _policy(rule, loss_scale={"kind": "dynamic"}), backend="aot_eager")
    state = run_state(model)
    assert state is not None
    for factor, is_beyond in ((1.0, False), (1e6, True), (1.0, False)):
        state.overflow = False
        (model(x).sum() * factor).backward()
        assert bool(state.overflow) is is_beyond


def test_other_sizes_share_one_graph() -> None:
    torch.manual_seed(0)
    model = lpcompile(_Model(), "fp8-rowwise")
    eager = copy.deepcopy(model)
    compile_joint(model, backend="aot_eager", fullgraph=True)
    for shape in ((4, 8), (3, 8), (5, 6), (2, 7)):
        x = torch.randn(*shape, 32)
        assert differences(_results(model, model, x), _results(eager, eager, x)) == []
    assert _captured(model).num_graphs <= 3


def test_inference_is_rewritten_too() -> None:
    model, x = _attention()
    lpcompile(model.eval(), "fp8-rowwise")
    eager = copy.deepcopy(model)
    compile_joint(model, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(model(x), eager(x))
    assert {role for roles in _captured(model).roles.values() for role in roles} == {"fwd"}


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("casts", [_CASTS, _DRAWS])
def test_checkpointed_layers_are_one_graph(casts: dict[str, Any], is_reentrant: bool) -> None:
    """Products of activations with them, although their scopes write while checkpointed code is traced."""
    torch.manual_seed(0)
    model = _Model(checkpoints=is_reentrant)
    _compare(model, torch.randn(4, 8, 32), _policy({"match": {}, **casts}), steps=2, counts=False, fullgraph=True)
    captured = _captured(model)
    assert captured.num_graphs == 1
    assert len(captured.roles) == 11
    assert all(len(roles) == 3 for roles in captured.roles.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_has_the_bits_and_dtypes_of_eager_code(dtype: torch.dtype) -> None:
    model, x = _attention()
    lpcompile(model, "hfp8")
    eager = copy.deepcopy(model)
    compile_joint(model, backend="aot_eager", fullgraph=True)
    found = []
    for each in (model, eager):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(_results(each, each, x.to(dtype)))
    assert differences(*found) == []
    assert found[0]["y"].dtype == torch.bfloat16


_SLOW = [
    pytest.param(name, policy, marks=pytest.mark.slow)
    for name in ("llama", "gpt2")
    for policy in ("fp8-rowwise", "hfp8", "int8")
]


@pytest.mark.parametrize(("name", "policy"), [("llama", "hfp8"), *_SLOW[:1], *_SLOW[2:]])
def test_a_language_model_has_the_bits_of_eager_code(name: str, policy: str) -> None:
    model, batch = _without_dropout(build(name)), ZOO[name].batch(0)
    lpcompile(model, policy, example_kwargs=batch)
    eager = copy.deepcopy(model)
    compile_joint(model, backend="aot_eager", fullgraph=True)
    assert differences(_language_results(model, model, batch), _language_results(eager, eager, batch)) == []
    assert _captured(model).num_products == len(report(model).gemms)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_inductor_is_within_rounding_of_the_leaf_path(name: str) -> None:
    """1e-3 of the largest element, as for lpcompile() under torch.compile: sums in other orders, casts that flip."""
    model, batch = _without_dropout(build(name)), ZOO[name].batch(0)
    lpcompile(model, "fp8-rowwise", example_kwargs=batch)
    expected = _language_results(model, model, batch)
    compile_joint(model, fullgraph=True)
    found = _language_results(model, model, batch)
    for key, want in expected.items():
        assert (found[key] - want).abs().max() <= 1e-3 * want.abs().max(), key


@pytest.mark.parametrize("is_prepared_first", [False, True])
def test_under_accelerate(is_prepared_first: bool) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model, x = _attention()
    lpcompile(model, _policy({"match": {}, **_CASTS}), example_inputs=(x,))
    eager = copy.deepcopy(model)
    weights = []
    for each in (model, eager):
        optimizer = torch.optim.SGD(each.parameters(), 0.5)
        run = each
        if each is model and not is_prepared_first:
            compile_joint(model, backend="aot_eager")
        run, optimizer = accelerator.prepare(each, optimizer)
        if each is model and is_prepared_first:
            compile_joint(run, backend="aot_eager")
        for _ in range(2):
            accelerator.backward(run(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            advance(each)
        weights.append({name: p.detach() for name, p in each.named_parameters()})
    assert differences(*weights) == []
    assert len(_captured(model).roles) == len(report(model).gemms) // 3 > 0


@pytest.mark.slow
def test_experts_have_the_bits_of_eager_code() -> None:
    """Which expert takes which token follows from data, so that their products stand behind breaks."""
    model = _without_dropout(build("mixtral"))
    lpcompile(model, "hfp8", example_kwargs=ZOO["mixtral"].batch(0))
    eager = copy.deepcopy(model)
    compile_joint(model, backend="aot_eager")
    for number in (0, 1, 0):
        batch = ZOO["mixtral"].batch(number)
        assert differences(_language_results(model, model, batch), _language_results(eager, eager, batch)) == []
    assert _calls(model) == _calls(eager)


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _language_results(run: Callable[..., Any], model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    output = run(**batch)
    output["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output["loss"].detach(), "logits": output["logits"].detach(), **gradients}

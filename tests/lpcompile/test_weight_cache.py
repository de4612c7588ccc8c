"""Casts of weights are kept, bit for bit: one per weight, spec and step in training, one ever at inference.

Every way to change a weight is seen. The pipeline without the pass is the oracle.
"""

import copy
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpcompile import advance, attach, lpcompile, report
from lpcompile.api import WatchWeights, restore, run_state
from passes.pipelines import PIPELINES
from runtime.numerics.specs import QuantSpec
from runtime.quantize import quantizer as casts
from tests.machine_facts import needs_kernels
from tests.zoo.models import ZOO, build, differences, names, run


@pytest.fixture(autouse=True)
def large_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts of small layers are not kept: these stand for large ones."""
    monkeypatch.setattr("runtime.ops.small.LARGEST", 0)


pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`"),
]
POLICIES = ["hfp8", "fp8-rowwise", "int8"]
Mode = Literal["train", "infer"]


@contextmanager
def casts_of(*weights: Tensor) -> Iterator[Counter[tuple[int, QuantSpec]]]:
    """How often each of the weights is really cast, by its number and the spec."""
    counted: Counter[tuple[int, QuantSpec]] = Counter()
    real = casts.fast_to_grid

    def count(x: Tensor, spec: QuantSpec, *args: Any, **kwargs: Any) -> Tensor:
        for number, weight in enumerate(weights):
            if weight.data_ptr() == x.data_ptr() and weight.numel() == x.numel():
                counted[number, spec] += 1
        return real(x, spec, *args, **kwargs)

    with mock.patch.object(casts, "fast_to_grid", count):
        yield counted


def compiled_without(model: nn.Module, policy: Any, mode: Mode = "train", **options: Any) -> nn.Module:
    """Compiled so that no cast of a weight is kept."""
    without = {name: text.partition(",fold-constants")[0] for name, text in PIPELINES.items()}
    with mock.patch.dict(PIPELINES, without):
        model = lpcompile(model, policy, mode=mode, **options)
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, WatchWeights)]:
        del hooks[key]
    assert not any(isinstance(hook, WatchWeights) for hook in model._forward_pre_hooks.values())
    return model


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))


def batch(seed: int = 1) -> Tensor:
    return torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y * batch(7)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


NUM_SPECS = {"hfp8": 1, "fp8-rowwise": 2, "int8": 2}
"""Of FWD's and BWD's cast of a weight: one where the two are the same."""


@pytest.mark.parametrize("policy", POLICIES)
def test_micro_batches_share_one_cast_per_weight_spec_and_step(policy: str) -> None:
    model = lpcompile(mlp(), policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    for _ in range(3):
        with casts_of(*weights_of(model)) as counted:
            for micro in range(4):
                model(batch(micro).requires_grad_()).square().sum().backward()
        assert len(counted) == 2 * NUM_SPECS[policy]
        assert set(counted.values()) == {1}
        assert run_state(model).constants.num_casts == len(counted)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_casts_of_a_step_take_the_place_of_those_before(policy: str) -> None:
    model = lpcompile(mlp(), policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    sizes = []
    for step in range(3):
        model(batch(step).requires_grad_()).square().sum().backward()
        optimizer.step()
        sizes.append((run_state(model).constants.num_casts, run_state(model).constants.num_bytes))
    assert len(set(sizes)) == 1
    assert sizes[0][0] == 2 * NUM_SPECS[policy]
    advance(model)
    assert run_state(model).constants.num_bytes == 0, "a step that asked for none"


@pytest.mark.parametrize("policy", POLICIES)
def test_at_inference_a_weight_is_cast_once_ever(policy: str) -> None:
    model, original = lpcompile(mlp().eval(), policy, mode="infer"), compiled_without(mlp().eval(), policy, "infer")
    with casts_of(*weights_of(model)) as counted, torch.no_grad():
        for seed in range(5):
            assert torch.equal(model(batch(seed)), original(batch(seed)))
            advance(model)
    assert len(counted) == 2
    assert set(counted.values()) == {1}


@pytest.mark.parametrize("policy", POLICIES)
def test_steps_of_training_have_the_bits_of_the_uncached_pipeline(policy: str) -> None:
    models = [lpcompile(mlp(), policy), compiled_without(mlp(), policy)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in models]
    attach(models[0], optimizers[0])
    for step in range(3):
        for micro in range(2):
            found, wanted = (results(model, batch(2 * step + micro)) for model in models)
            assert_same(found, wanted)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", names(lambda model: True))
def test_the_zoo_has_the_bits_of_the_uncached_pipeline(name: str, policy: str) -> None:
    """Outputs, loss, buffers and every gradient, twice, so that the second run finds what the first kept."""
    given = ZOO[name].batch(0)
    model = lpcompile(build(name).train(), policy, example_kwargs=given)
    original = compiled_without(build(name).train(), policy, example_kwargs=given)
    for _ in range(2):
        assert differences(run(model, given), run(original, given)) == []
    assert run_state(model).constants.num_casts > 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_recomputation_finds_the_same_cast(policy: str, reentrant: bool) -> None:
    given = ZOO["llama"].batch(0)
    model = lpcompile(build("llama").train(), policy, example_kwargs=given)
    original = compiled_without(build("llama").train(), policy, example_kwargs=given)
    for each in (model, original):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with casts_of(*weights_of(model)) as counted:
        found = run(model, given)
    assert differences(found, run(original, given)) == []
    assert set(counted.values()) == {1}


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_generate_casts_once_and_gives_the_same_tokens(mode: Mode) -> None:
    given = ZOO["llama"].batch(0)
    model = lpcompile(build("llama").eval(), "int8", example_kwargs=given, mode=mode)
    original = compiled_without(build("llama").eval(), "int8", mode, example_kwargs=given)
    prompt = {key: given[key][:1, :6] for key in ("input_ids", "attention_mask")}
    with casts_of(*weights_of(model)) as counted:
        tokens = [each.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0) for each in (model,)]
    tokens.append(original.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert torch.equal(*tokens)
    assert counted
    assert set(counted.values()) == {1}


class Tied(nn.Module):
    """Two products with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tied_weight_has_one_cast_per_spec(policy: str) -> None:
    model, original = lpcompile(Tied(), policy), compiled_without(Tied(), policy)
    with casts_of(model.a.weight) as counted:
        found = results(model, batch())
    assert_same(found, results(original, batch()))
    assert len(counted) == NUM_SPECS[policy]
    assert set(counted.values()) == {1}
    assert report(model).num_kept_casts == NUM_SPECS[policy]


def _load(model: nn.Module) -> None:
    model.load_state_dict(mlp(5).state_dict())


WRITES: dict[str, Callable[[Any], object]] = {
    "p.data.copy_": lambda model: model[0].weight.data.copy_(model[0].weight.data.roll(1, 0)),
    "p.data.mul_": lambda model: model[2].weight.data.mul_(-1),
    "p.data = ": lambda model: setattr(model[0].weight, "data", model[0].weight.data.flip(1)),
    "no_grad": lambda model: torch.no_grad()(model[0].weight.add_)(0.5),
    "numpy": lambda model: model[0].weight.detach().numpy().fill(0.25),
    "load_state_dict": _load,
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(mlp(5).state_dict(), assign=True),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "a new parameter": lambda model: setattr(model[0], "weight", nn.Parameter(mlp(5)[0].weight.detach())),
    "an optimizer that nobody attached": lambda model: torch.optim.SGD(model.parameters(), lr=0.5).step(),
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(
        torch.linspace(-1, 1, sum(p.numel() for p in model.parameters())), model.parameters()
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_every_change_of_a_weight_is_seen(write: str, policy: str, mode: Mode) -> None:
    models = [lpcompile(mlp(), policy, mode=mode), compiled_without(mlp(), policy, mode)]
    for model in models:
        results(model, batch())
        WRITES[write](model)
    dtype = models[0][0].weight.dtype
    found, wanted = (results(model, batch().to(dtype)) for model in models)
    assert_same(found, wanted)
    assert run_state(models[0]).constants.num_casts <= 2 * NUM_SPECS[policy], "the stale ones are gone"


def test_a_write_between_forward_and_backward_is_seen_by_backward() -> None:
    models = [lpcompile(mlp(), "hfp8"), compiled_without(mlp(), "hfp8")]
    gradients = []
    for model in models:
        x = batch().requires_grad_()
        y = model(x)
        model[0].weight.data.neg_()
        y.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


EVERY_PRODUCT = """
version: 1
name: every product
rules:
  - match: {{op: linear}}
    fwd: {{x: e4m3, w: {{format: e4m3{scale}}}}}
    bwd: {{dy: e5m2, w: {{format: e5m2{scale}}}}}
    grad: {{dy: e5m2, x: e4m3}}
  - match: {{op: matmul}}
    fwd: {{a: e4m3, b: {{format: e4m3{scale}}}}}
    bwd: {{dy: e5m2, b: {{format: e5m2{scale}}}}}
    grad: {{dy: e5m2, a: e4m3}}
"""


class Viewed(nn.Module):
    """Products with a view of a parameter and with an expression of parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.w, self.gain = nn.Parameter(torch.randn(24, 24)), nn.Parameter(torch.rand(24, 1))
        self.register_buffer("variance", torch.rand(24, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        folded = self.w * (self.gain * torch.rsqrt(self.variance + 1e-5))
        return F.linear(x @ self.w.t(), folded)


@pytest.mark.parametrize("scale", ["none", "{granularity: tensor}"])
def test_a_view_of_a_weight_is_one_and_an_expression_is_cast_anew(scale: str, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(EVERY_PRODUCT.format(scale="" if scale == "none" else f", scale: {scale}"))
    kwargs = {"example_inputs": (batch(),)}
    models = [lpcompile(Viewed(), file, **kwargs), compiled_without(Viewed(), file, **kwargs)]
    kept = run_state(models[0]).constants
    for write in (lambda _: None, lambda model: model.variance.data.mul_(2), lambda model: model.w.data.neg_()):
        for model in models:
            write(model)
        real, calls = casts.fast_to_grid, Counter[bool]()
        assert_same(*(results(model, batch()) for model in models))
        num = kept.num_casts
        assert num == 2, "FWD's and BWD's of one"

        def count(x: Tensor, *args: Any, real: Any = real, calls: Counter[bool] = calls, **kwargs: Any) -> Tensor:
            calls[x.shape == (24, 24)] += 1
            return real(x, *args, **kwargs)

        with mock.patch.object(casts, "fast_to_grid", count), torch.no_grad():
            models[0](batch())
        assert calls[True] == 1, "the view's is found again"
        assert kept.num_casts == num


def test_a_copy_keeps_its_own() -> None:
    model = lpcompile(mlp(), "int8")
    results(model, batch())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert report(other).kept_bytes == 0
        assert run_state(other).constants is not run_state(model).constants
        other[0].weight.data.neg_()
        fresh = compiled_without(mlp(), "int8")
        fresh[0].weight.data.neg_()
        assert_same(results(other, batch()), results(fresh, batch()))
        assert report(other).num_kept_casts == 4
    assert_same(results(model, batch()), results(compiled_without(mlp(), "int8"), batch()))


def test_nothing_of_it_is_in_a_state_dict_or_a_checkpoint() -> None:
    model = lpcompile(mlp(), "int8")
    before = len(pickle.dumps(model))
    results(model, batch())
    model.zero_grad()
    assert list(model.state_dict()) == list(mlp().state_dict())
    after = len(pickle.dumps(model))
    assert after - before < report(model).kept_bytes / 2, "counters and plans, and no cast"
    results(model, batch())
    model.zero_grad()
    assert len(pickle.dumps(model)) == after


SCHEDULE = """
version: 1
name: phases
rules:
  - match: {name: "*"}
    fwd: {x: e4m3, w: e4m3}
    bwd: {dy: e5m2, w: e4m3}
    grad: {dy: e5m2, x: e4m3}
schedule: [{from_step: 0, policy: int8}, {from_step: 1}]
"""


def test_another_phase_casts_by_its_own_specs(tmp_path: Path) -> None:
    file = tmp_path / "phases.yaml"
    file.write_text(SCHEDULE)
    models = [lpcompile(mlp(), file), compiled_without(mlp(), file)]
    for step in (0, 1, 0):
        for model in models:
            advance(model, to_step=step)
        assert_same(*(results(model, batch()) for model in models))
        run_state(models[0]).phase = 1 - run_state(models[0]).phase  # without advance: the specs tell
        run_state(models[1]).phase = run_state(models[0]).phase
        assert_same(*(results(model, batch()) for model in models))


STOCHASTIC = """
version: 1
name: random
rules:
  - match: {name: "*"}
    fwd: {x: e4m3, w: {format: e4m3, rounding: stochastic}}
    bwd: {dy: e5m2, w: {format: e4m3, rounding: stochastic}}
    grad: {dy: e5m2, x: e4m3}
"""


def test_stochastic_casts_of_weights_are_drawn_anew_with_the_bits_they_had(tmp_path: Path) -> None:
    file = tmp_path / "random.yaml"
    file.write_text(STOCHASTIC)
    models = [lpcompile(mlp(), file), compiled_without(mlp(), file)]
    outputs = []
    for _ in range(2):
        found, wanted = (results(model, batch()) for model in models)
        assert_same(found, wanted)
        outputs.append(found[0])
    assert not torch.equal(*outputs), "micro-batches draw other bits"
    assert report(models[0]).kept_bytes == 0


def test_training_and_inference_in_turns() -> None:
    """What inference mode cast must serve the backward after it."""
    models = [lpcompile(mlp(), "hfp8"), compiled_without(mlp(), "hfp8")]
    for model in models:
        with torch.inference_mode():
            model.eval()(batch())
        model.train()
    assert_same(*(results(model, batch()) for model in models))


def test_the_report_tells_what_is_kept() -> None:
    model = lpcompile(mlp(), "int8")
    assert "casts of weights: none kept: no forward of the model has run" in report(model).to_text()
    results(model, batch())
    found = report(model)
    scales = (48 + 24) + (24 + 48)  # one per output feature for FWD, and per input feature for BWD
    assert found.kept_bytes == 4 * 24 * 48 + 4 * scales
    assert f"casts of weights: 4 kept, {found.kept_bytes} bytes" in found.to_text()
    told = json.loads(found.to_json())
    assert (told["num_kept_casts"], told["kept_bytes"], told["why_none_kept"]) == (4, found.kept_bytes, "")
    plain = lpcompile(mlp(), "fp32-emulated")
    assert "casts of weights: none kept: no pass found one to keep" in report(plain).to_text()


def test_restore_takes_the_hook_away() -> None:
    model = lpcompile(mlp(), "hfp8")
    assert len(model._forward_pre_hooks) == 1
    restore(model)
    assert not model._forward_pre_hooks


def test_under_torch_compile_weights_are_cast_in_the_graph() -> None:
    model = lpcompile(mlp(), "fp8-rowwise")
    wanted = results(model, batch())
    run_state(model).constants.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, batch()), wanted)  # type: ignore[arg-type]
    assert report(model).kept_bytes == 0

"""A compiled model under torch.compile: one graph, the bits of eager code where nothing else is fused, as many kernels
as the original where the policy touches nothing, and no compilation per step.

The oracle is the same model in eager code. backend="aot_eager" runs torch's decompositions op by op and must give the
same bits; inductor fuses and orders sums anew.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

from lpcompile import Policy, advance, lpcompile
from lpcompile.api import run_state
from tests.zoo.models import ZOO, Batch, build, differences

_POLICIES = ("fp8-rowwise", "hfp8", "int8", "fp32")
_FAST = ("llama", "fp8-rowwise", True)
_CASES = [
    pytest.param(*case, marks=[] if case == _FAST else pytest.mark.slow)
    for case in itertools.product(("llama", "gpt2"), _POLICIES, (True, False))
]
"""Model, policy, whether attention is captured."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))


def _gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


def _language_model(name: str) -> nn.Module:
    """Without dropout, whose random numbers no compiler draws as eager code does."""
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _results(run: Callable[..., Any], model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    output = run(**batch)
    output["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output["loss"].detach(), "logits": output["logits"].detach(), **gradients}


@pytest.mark.parametrize("policy", ["fp8-rowwise", "hfp8", "int8"])
def test_one_graph_with_the_bits_of_eager_code(policy: str) -> None:
    model, x = _model(), torch.randn(64, 32)
    lpcompile(model, policy)
    expected = _gradients(model, model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(_gradients(compiled, model, x), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "policy", "is_captured"), _CASES)
def test_a_language_model_is_one_graph_with_the_bits_of_eager_code(name: str, policy: str, is_captured: bool) -> None:
    model, batch = _language_model(name), ZOO[name].batch(0)
    lpcompile(model, policy, example_kwargs=batch if is_captured else None)
    expected = _results(model, model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert differences(_results(compiled, model, batch), expected) == []
    for _ in range(2):  # micro-batches
        _results(compiled, model, batch)
    advance(model)
    _results(compiled, model, batch)
    assert _num_graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("policy", _POLICIES)
def test_inductor_is_within_rounding_of_eager_code(name: str, policy: str) -> None:
    """1e-3 of the largest element: a sum in another order moves an activation by an ulp, and where that crosses a
    rounding boundary its cast moves by a step of the format, 2^-4 of one term of a sum. Measured: 5e-7.
    """
    model, batch = _language_model(name), ZOO[name].batch(0)
    lpcompile(model, policy, example_kwargs=batch)
    expected = _results(model, model, batch)
    found = _results(torch.compile(model, fullgraph=True), model, batch)
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        assert (found[key] - want).abs().max() <= 1e-3 * want.abs().max(), key


@pytest.mark.parametrize("policy", ["fp8-rowwise", "int8"])
def test_other_sizes_are_compiled_once(policy: str) -> None:
    """One graph for the first size, one with symbols for every other."""
    model = _model()
    lpcompile(model, policy)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=None)
    for rows in (64, 40, 24, 64, 17):
        x = torch.randn(rows, 32)
        expected = _gradients(model, model, x)
        for got, want in zip(_gradients(compiled, model, x), expected, strict=True):
            assert torch.equal(got, want)
    assert _num_graphs() == 2


def test_attention_of_another_tensor_is_not_compiled_anew() -> None:
    """What tells q, k and v apart in a trace must not be the identity of a tensor."""
    counter = CompileCounterWithBackend("aot_eager")
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    run = torch.compile(lpcompile(attention, "fp8-rowwise"), backend=counter, fullgraph=True)
    others = [torch.randn(2, 4, 16) for _ in range(6)]
    for x in others:
        run(x, x, x)
    assert counter.frame_count == 1
    for x, y in zip(others, reversed(others)):
        run(x, y, y)
    assert counter.frame_count == 2


def test_evaluation_and_training_are_a_graph_each() -> None:
    model, x = _model(), torch.randn(64, 32)
    lpcompile(model, "fp8-rowwise", example_inputs=(x,))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        model.train()
        _gradients(compiled, model, x)
        model.eval()
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
    assert _num_graphs() <= 2


def test_overflow_is_noticed_and_clearing_it_compiles_nothing() -> None:
    model, x = nn.Sequential(_model(), nn.Linear(16, 16)), torch.randn(64, 32)  # hfp8 casts what is in the middle
    lpcompile(model, "hfp8")
    state = run_state(model)
    assert state is not None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for factor, is_beyond in ((1.0, False), (1e6, True), (1.0, False)):
        state.overflow = False
        model.zero_grad()
        (compiled(x).square().sum() * factor).backward()
        assert bool(state.overflow) is is_beyond
    assert _num_graphs() == 1


def test_stochastic_rounding_draws_anew_and_compiles_nothing() -> None:
    """Every step and micro-batch has other random bits, those of eager code, and all share one graph."""
    dy, x = {"format": "e5m2", "rounding": "stochastic"}, {"format": "e4m3", "rounding": "stochastic"}
    roles = {"fwd": {"x": x, "w": "e4m3"}, "bwd": {"dy": dy, "w": "e4m3"}, "grad": {"dy": dy, "x": "e4m3"}}
    model, data = _model(), torch.randn(64, 32)
    lpcompile(model, Policy.model_validate({"rules": [{"match": {"op": "linear"}, **roles}]}))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen: list[Tensor] = []
    for step in range(4):
        results = []
        for run in (model, compiled):
            advance(model, step)
            results.append([_gradients(run, model, data) for _ in range(3)])
        for expected, found in zip(*results):
            assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))
            assert not any(torch.equal(found[0], other) for other in seen)
            seen.append(found[0])
    assert _num_graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fp32_has_the_kernels_of_the_original(name: str) -> None:
    batch = ZOO[name].batch(0)
    lpcompile(_language_model("gpt2"), "fp32")  # transformers' warning is no kernel
    original, compiled = _language_model(name), _language_model(name)
    lpcompile(compiled, "fp32", example_kwargs=batch)
    counts = []
    for model in (original, compiled):
        torch._dynamo.reset()
        metrics.reset()
        _results(torch.compile(model, fullgraph=True), model, batch)
        counts.append((metrics.generated_kernel_count, metrics.generated_cpp_vec_kernel_count))
    assert counts[0][0] > 0
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_norms_and_the_casts_behind_them_are_one_kernel(name: str) -> None:
    """The residual before a norm, the norm, the amax of its rows and the rounding: five norms, five kernels."""
    batch, model = ZOO[name].batch(0), build(name).eval()
    lpcompile(model, "fp8-rowwise", example_kwargs=batch)
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(model, fullgraph=True), **batch)
    kernels = [text.partition("''')")[0] for text in codes[0].split(" = async_compile.")[1:]]
    norms = [kernel for kernel in kernels if "sqrt(" in kernel]
    assert len(norms) == 5
    assert all("448" in kernel for kernel in norms)  # the amax of e4m3 and its saturation


@pytest.mark.parametrize("with_examples", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_that_is_named_is_in_the_one_graph(name: str, with_examples: bool) -> None:
    """With the bits of eager code in the loss and every gradient, and nothing compiled again from step to step."""
    casts = {"x": "e4m3", "w": "e4m3"}, {"dy": "e5m2", "w": "e4m3"}, {"dy": "e5m2", "x": "e4m3"}
    rule = {"match": {"name": "*"}, **dict(zip(("fwd", "bwd", "grad"), casts))}
    policy = Policy.model_validate({"version": 1, "name": "everything", "rules": [rule]})
    batch = ZOO[name].batch(0)
    model, eager = (build(name).eval() for _ in range(2))
    lpcompile(model, policy, example_kwargs=batch if with_examples else None, strict=True)
    lpcompile(eager, policy, example_kwargs=batch, strict=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        loss, wanted = compiled(**batch)["loss"], eager(**batch)["loss"]
        loss.backward()
        wanted.backward()
        assert torch.equal(loss, wanted)
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
        for each in (model, eager):
            each.zero_grad()
            advance(each)
    assert counter.frame_count == 1

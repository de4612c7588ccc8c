"""Recorder: which modules get a graph, what is in it, why the others have none, and that nothing is left behind."""

import gc
import inspect
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lpcompile.capture.recorder import record
from lpcompile.capture.recording import RecordResult
from lpcompile.capture.variants import Variant, install
from tests.models_for_tests import build, image_batch, tiny_llama, token_batch


def is_leaf(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def run(model: nn.Module, *args: Any, **kwargs: Any) -> RecordResult:
    return record(model, args, kwargs, is_leaf=is_leaf)


def op_name(node: fx.Node) -> str:
    """`__matmul__`, `mm.default` -> matmul, mm."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.partition(".")[0].removeprefix("__").removesuffix("__")


def ops(graph: fx.Graph) -> list[str]:
    return [node.target if node.op == "call_module" else op_name(node) for node in graph.nodes if node.op[:4] == "call"]


def reason_of(model: nn.Module, *args: Any, path: str = "", **kwargs: Any) -> str:
    result = run(model, *args, **kwargs)
    assert path not in result.recordings
    return result.opaque[path].reason


class Wrapped(nn.Module):
    """A forward written as a function of the module and its arguments."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("table", torch.arange(4.0))
        for name, child in children.items():
            self.add_module(name, child)
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self, *args, **kwargs)


# -- coverage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recorded", "opaque"),
    [
        ("gpt2-eager", 10, []),
        ("gpt2-sdpa", 9, ["transformer"]),
        ("llama-eager", 16, []),
        ("llama-sdpa", 15, ["model"]),
        ("resnet", 5, []),
    ],
)
def test_coverage_of_real_models(name: str, recorded: int, opaque: list[str]) -> None:
    example = build(name)
    result = run(example.model, **example.batch)
    assert len(result.recordings) == recorded
    assert list(result.opaque) == opaque
    assert all("__bool__" in str(result.opaque[path]) for path in opaque)


def test_children_are_calls_and_own_weights_are_not_hoisted() -> None:
    example = build("llama-eager")
    result = run(example.model, **example.batch)
    for path, (recording,) in result.recordings.items():
        module = example.model.get_submodule(path)
        own = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
        assert {node.target for node in recording.graph.nodes if node.op == "get_attr"} <= own
    assert "layers.0" in ops(result.recordings["model"][0].graph)
    assert ops(result.recordings["model.layers.0"][0].graph) == [
        "input_layernorm", "self_attn", "getitem", "add", "post_attention_layernorm", "mlp", "add",
    ]  # fmt: skip


def test_sequential_is_entered_and_torch_layers_are_not() -> None:
    example = build("resnet")
    result = run(example.model, **example.batch)
    assert list(result.recordings) == ["", "stem", "stages.0", "stages.1", "stages.1.shortcut"]
    assert ops(result.recordings["stem"][0].graph) == ["0", "1", "2"]


def test_is_leaf_is_not_entered() -> None:
    example = build("llama-eager")
    result = record(example.model, (), example.batch, is_leaf=lambda m: type(m).__name__ == "LlamaMLP")
    assert "model.layers.0.mlp" not in result.recordings
    assert "model.layers.0.mlp.act_fn" not in result.recordings


def test_transformer_encoder_is_entered_and_attention_is_one_leaf() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    result = run(encoder, torch.randn(3, 2, 16))
    assert "self_attn" in ops(result.recordings["layers.0"][0].graph)


def test_module_called_twice_with_other_sizes_has_one_variant_unless_a_size_is_one() -> None:
    child = Wrapped(lambda self, x: x @ self.weight)
    model = Wrapped(lambda self, x, y: self.child(x).sum() + self.child(y).sum() + self.child(x).sum(), child=child)
    result = run(model, torch.randn(2, 4), torch.randn(3, 4))
    assert [v.guard.leaves[0].shape for v in result.recordings["child"]] == [("s0", 4)]  # type: ignore[union-attr]
    result = run(model, torch.randn(2, 4), torch.randn(1, 4))
    assert [v.guard.leaves[0].shape for v in result.recordings["child"]] == [("s0", 4), (1, 4)]  # type: ignore[union-attr]


def test_placeholders_are_distinct_tensors() -> None:
    model = Wrapped(lambda self, q, k, v: q + k[0] + k[1] + v)
    x, y = torch.randn(4), torch.randn(4)
    recording = run(model, x, (x, y), y).recordings[""][0]
    assert sum(node.op == "placeholder" for node in recording.graph.nodes) == 2


# -- opaque ------------------------------------------------------------------------------------------------------------


def test_cache_argument_is_opaque_and_the_rest_is_recorded() -> None:
    model = tiny_llama()
    result = run(model, **token_batch(), use_cache=True)
    assert "passes a DynamicCache" in result.opaque["model"].reason
    assert "takes a DynamicCache as past_key_values" in result.opaque["model.layers.0"].reason
    assert "takes a DynamicCache as past_key_values" in result.opaque["model.layers.0.self_attn"].reason
    assert "model.layers.0.mlp" in result.recordings
    assert "model.norm" in result.recordings


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: bool(x.sum() > 0), "__bool__"),
        (lambda x: int(x.sum()), "__int__"),
        (lambda x: x.sum().item(), "item"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.detach().numpy(), "numpy"),
        (lambda x: torch.equal(x, x), "equal"),
    ],
)
def test_data_dependence_is_opaque(read: Callable[[Tensor], object], name: str) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        read(x)
        return x * 2

    result = run(Wrapped(forward), torch.randn(4))
    assert name in result.opaque[""].reason
    assert result.opaque[""].where == f"{__file__}:{line_of('read(x)')}"


def test_size_that_depends_on_data_is_opaque_only_where_it_is_read() -> None:
    result = run(Wrapped(lambda self, x: x[x > 0].mean()), torch.randn(9))
    assert "" in result.recordings
    assert "size depends on data" in reason_of(Wrapped(lambda self, x: x / x[x > 0].shape[0]), torch.randn(9))
    inner = Wrapped(lambda self, x: x[x > 0])
    assert "size depends on data" in reason_of(
        Wrapped(lambda self, x: self.inner(x).sum() / self.inner(x).numel(), inner=inner), torch.randn(9)
    )


def test_tensor_from_outside_is_opaque() -> None:
    constant = torch.randn(4)
    assert "was made by no recorded operation" in reason_of(Wrapped(lambda self, x: x + constant), torch.randn(4))

    model = Wrapped(lambda self, x: x + self.plain)
    model.plain = torch.randn(4)
    assert "was made by no recorded operation" in reason_of(model, torch.randn(4))


def test_autocast_inside_is_opaque() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ self.weight

    assert "changes autocast" in reason_of(Wrapped(forward), torch.randn(4, 4))


def test_random_python_is_opaque() -> None:
    assert "random generator" in reason_of(Wrapped(lambda self, x: x * random.random()), torch.randn(4))
    assert "random generator" in reason_of(Wrapped(lambda self, x: x * float(np.random.rand())), torch.randn(4))


def test_own_checkpoint_is_opaque_and_its_child_is_recorded() -> None:
    for use_reentrant in (False, True):
        child = Wrapped(lambda self, x: x @ self.weight)
        model = Wrapped(
            lambda self, x, r=use_reentrant: torch.utils.checkpoint.checkpoint(self.child, x, use_reentrant=r),
            child=child,
        )
        result = run(model, torch.randn(4, 4, requires_grad=True))
        assert "checkpoints a part of itself" in result.opaque[""].reason
        assert "child" in result.recordings


def test_module_made_on_the_way_is_inlined_and_a_weight_in_it_is_opaque() -> None:
    assert ops(run(Wrapped(lambda self, x: nn.GELU()(x)), torch.randn(4)).recordings[""][0].graph) == ["gelu"]
    other = nn.Linear(4, 4)
    assert "no recorded operation" in reason_of(Wrapped(lambda self, x: other(x)), torch.randn(4))


def test_sibling_and_odd_results_are_opaque() -> None:
    a, b = Wrapped(lambda self, x: x), Wrapped(lambda self, x: self.friends[0](x))
    b.friends = [a]
    model = Wrapped(lambda self, x: self.b(x), a=a, b=b)
    assert "not one of its children" in reason_of(model, torch.randn(4), path="b")
    assert "returns an object" in reason_of(Wrapped(lambda self, x: (x, object())), torch.randn(4))
    assert "reads requires_grad" in reason_of(Wrapped(lambda self, x: x if x.requires_grad else -x), torch.randn(4))


def test_container_written_by_the_callee_is_opaque_for_both() -> None:
    def append(self: nn.Module, x: Tensor, history: list[Tensor]) -> Tensor:
        history.append(x)
        return x * 2

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        history: list[Tensor] = []
        return self.child(x, history) + history[0]

    result = run(Wrapped(forward, child=Wrapped(append)), torch.randn(4))
    assert "writes to a container" in result.opaque["child"].reason
    assert "a container that child writes to" in result.opaque[""].reason


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.history: list[int] = []
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.calls += 1
        return y


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip() == text)


def test_python_side_effect_is_opaque_with_its_line() -> None:
    model = Wrapped(lambda self, x: self.child(x) * 2, child=Counter())
    result = run(model, torch.randn(4))
    assert str(result.opaque["child"]) == f"{__file__}:{line_of('self.calls += 1')}: changes the attribute calls"
    assert list(result.recordings) == [""]
    assert model.child.calls == 0


def test_side_effects_on_others_are_opaque_too() -> None:
    def write_child(self: nn.Module, x: Tensor) -> Tensor:
        self.child.calls = 7
        return x * 2

    def append(self: nn.Module, x: Tensor) -> Tensor:
        self.child.history.append(1)
        return x * 2

    def assign_buffer(self: nn.Module, x: Tensor) -> Tensor:
        self.table = self.table + 1
        return x * 2

    model = Wrapped(write_child, child=Counter())
    assert "child.calls" in reason_of(model, torch.randn(4))
    assert model.child.calls == 0
    model = Wrapped(append, child=Counter())
    assert "child.history" in reason_of(model, torch.randn(4))
    assert model.child.history == []
    model = Wrapped(assign_buffer)
    assert "_buffers" in reason_of(model, torch.randn(4))
    assert torch.equal(model.table, torch.arange(4.0))


def test_side_effects_on_a_descendant_are_opaque_by_whatever_way() -> None:
    history: list[int] = []

    def through_vars(self: nn.Module, x: Tensor) -> Tensor:
        vars(self.child.child)["calls"] = 7
        return self.child(x) * 2

    def through_an_alias(self: nn.Module, x: Tensor) -> Tensor:
        history.append(1)
        return self.child(x) * 2

    def between_two_calls(self: nn.Module, x: Tensor) -> Tensor:
        y = self.child(x)
        self.child.child.calls = 3
        return self.child(y)

    def buffers_by_hand(self: nn.Module, x: Tensor) -> Tensor:
        self.child.child._buffers["table"] = x
        return self.child(x) * 2

    for function, name in (
        (through_vars, "child.child.calls"),
        (through_an_alias, "child.child.history"),
        (between_two_calls, "child.child.calls"),
        (buffers_by_hand, "child.child._buffers"),
    ):
        inner = Wrapped(lambda self, x: x * 2)
        inner.calls, inner.history = 0, history
        model = Wrapped(function, child=Wrapped(lambda self, x: self.child(x), child=inner))
        assert name in reason_of(model, torch.randn(4))
        assert inner.calls == 0
        assert history == []


def test_configuration_written_by_the_forward_is_opaque_and_restored() -> None:
    class Settings:
        calls = 0

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        self.settings.calls += 1
        return x * 2

    model = Wrapped(forward)
    model.settings = Settings()
    assert "settings" in reason_of(model, torch.randn(4))
    assert vars(model.settings) == {}


def test_forward_replaced_on_the_instance_is_opaque() -> None:
    model = Wrapped(lambda self, x: x)
    model.forward = lambda x: x * 2  # type: ignore[method-assign]
    assert "replaced on the instance" in reason_of(model, torch.randn(4))
    assert "forward" in vars(model)


# -- autograd.Function -------------------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """x -> x, with twice its gradient: only a backward of its own can tell."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


bound_early = Doubled.apply


def test_autograd_function_is_one_node() -> None:
    graph = run(Wrapped(lambda self, x: Doubled.apply(x @ self.weight) + 1), torch.randn(4, 4)).recordings[""][0].graph
    assert ops(graph) == ["matmul", "Doubled", "add"]


def test_autograd_function_bound_before_recording_is_opaque() -> None:
    assert "bound before" in reason_of(Wrapped(lambda self, x: bound_early(x) + 1), torch.randn(4, 4))


# -- grad mode ---------------------------------------------------------------------------------------------------------


def test_grad_mode_is_guarded_only_where_it_matters() -> None:
    example = build("llama-eager")
    result = run(example.model, **example.batch)
    guarded = {path for path, (recording,) in result.recordings.items() if recording.guard.grad_enabled is not None}
    assert guarded == {"model.rotary_emb"}
    assert result.recordings["model.rotary_emb"][0].switches_grad_mode

    reader = Wrapped(lambda self, x: x * 2 if torch.is_grad_enabled() else x * 3)
    with torch.no_grad():
        assert run(reader, torch.randn(4)).recordings[""][0].guard.grad_enabled is False


def test_grad_mode_left_changed_is_opaque() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        return x * 2

    assert "grad mode" in reason_of(Wrapped(forward), torch.randn(4))
    assert torch.is_grad_enabled()


# -- no trace ----------------------------------------------------------------------------------------------------------


def test_recording_leaves_no_trace() -> None:
    model = build("resnet").model
    batch = image_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = [dict(vars(module)) for module in model.modules()]
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    run(model, **batch)
    assert torch.equal(rng[0], torch.get_rng_state())
    assert rng[1] == random.getstate()
    assert (rng[2] == np.random.get_state()[1]).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [dict(vars(module)) for module in model.modules()] == states
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(batch["pixels"], image_batch()["pixels"])


def test_written_arguments_and_parameters_are_restored() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.data.mul_(2)
        x += 1
        return F.relu(x, True) @ self.weight

    model, x = Wrapped(forward), torch.randn(4, 4)
    weight, before = model.weight.detach().clone(), x.clone()
    recording = run(model, x).recordings[""][0]
    assert torch.equal(model.weight, weight)
    assert torch.equal(x, before)
    assert ops(recording.graph) == [
        "_set_grad_enabled", "getattr", "mul_", "_set_grad_enabled", "add_", "relu", "matmul",
    ]  # fmt: skip


def test_error_in_the_forward_is_passed_on_and_restored() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        self.calls = 1
        torch.set_grad_enabled(False)
        raise KeyError("mine")

    model, call = Wrapped(forward), nn.Module.__call__
    with pytest.raises(KeyError, match="mine"):
        run(model, torch.randn(4))
    assert torch.is_grad_enabled()
    assert not hasattr(model, "calls")
    assert nn.Module.__call__ is call
    assert "__getattribute__" not in vars(nn.Module)


def test_patches_are_gone() -> None:
    watched = (nn.Module.__call__, nn.Module.__setattr__, torch.autograd.Function.apply, torch.is_grad_enabled)
    run(Wrapped(lambda self, x: x), torch.randn(4))
    assert watched == (nn.Module.__call__, nn.Module.__setattr__, torch.autograd.Function.apply, torch.is_grad_enabled)


def test_no_autograd_graph_stays_alive() -> None:
    result = run(Wrapped(lambda self, x: (x @ self.weight).relu()), torch.randn(57, 4))
    gc.collect()
    assert "" in result.recordings
    shapes = [tuple(each.shape) for each in gc.get_objects() if type(each) is Tensor and each.grad_fn is not None]
    assert (57, 4) not in shapes


# -- soundness ---------------------------------------------------------------------------------------------------------


def test_dropout_that_did_nothing_is_still_a_node_of_its_own() -> None:
    model = Wrapped(lambda self, x: x + self.drop(x), drop=nn.Dropout(0.0))
    (recording,) = run(model, torch.ones(64)).recordings[""]
    install(model, [Variant.of(recording)])
    model.drop.p = 1.0
    assert torch.equal(model(torch.ones(64)), torch.ones(64))


def test_hooks_run_as_hooks_and_are_not_recorded() -> None:
    model = Wrapped(lambda self, x: self.child(x) + 1, child=nn.Linear(4, 4))
    model.child.register_forward_hook(lambda module, args, output: output * 3)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert ops(run(model, torch.randn(4)).recordings[""][0].graph) == ["child", "add"]


def test_child_called_self() -> None:
    model = Wrapped(lambda self, x: self.get_submodule("self")(x) @ self.weight)
    model.add_module("self", nn.Linear(4, 4))
    (recording,) = run(model, x := torch.randn(2, 4)).recordings[""]
    expected = model(x)
    install(model, [Variant.of(recording)])
    assert torch.equal(model(x), expected)


def test_operation_that_raised_and_was_caught_is_not_replayed() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        try:
            return x.view(3, 3)
        except RuntimeError:
            return x * 2

    assert ops(run(Wrapped(forward), torch.randn(4)).recordings[""][0].graph) == ["mul"]


def test_recording_a_captured_model_records_the_original() -> None:
    example = build("llama-eager")
    first = run(example.model, **example.batch)
    for path, recordings in first.recordings.items():
        install(example.model.get_submodule(path), [Variant.of(recording) for recording in recordings])
    second = run(example.model, **example.batch)
    assert list(second.recordings) == list(first.recordings)
    assert all(
        str(a.graph) == str(b.graph) for path in first.recordings
        for a, b in zip(first.recordings[path], second.recordings[path])
    )  # fmt: skip


def test_signature_of_record() -> None:
    assert list(inspect.signature(record).parameters) == ["model", "args", "kwargs", "is_leaf", "precedents"]

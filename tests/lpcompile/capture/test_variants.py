"""Install: a module with its own graph under it computes the same bits, and stays the module it was."""

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lpcompile.capture.recorder import record
from lpcompile.capture.variants import CapturedForward, Variant, captured, install
from lpcompile.frontends.install import captured_class, uninstall
from tests.models_for_tests import MODELS, build, image_batch, token_batch


def capture(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Record the model and install every graph unchanged."""
    result = record(model, (), kwargs, is_leaf=lambda module: type(module).__name__ == "Conv1D")
    modules = dict(model.named_modules())
    for path, recordings in result.recordings.items():
        install(modules[path], [Variant.of(recording) for recording in recordings])
    return model


def train_step(model: nn.Module, batch: dict[str, Any], seed: int = 3) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss, logits and every gradient of one step, with the dropout of that seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(**batch)
    output["loss"].backward()
    return output["loss"].detach(), output["logits"].detach(), [parameter.grad for parameter in model.parameters()]


def assert_same(left: Any, right: Any) -> None:
    """Bit for bit."""
    for a, b in zip((*left[:2], *left[2]), (*right[:2], *right[2]), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def records(model: nn.Module) -> dict[str, CapturedForward]:
    return {path: found for path, module in model.named_modules() if (found := captured(module)) is not None}


def num_hits(model: nn.Module) -> int:
    return sum(found.num_hits for found in records(model).values())


class Product(nn.Module):
    """x @ weight: one functional GEMM and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """The product."""
        return x @ self.weight * scale


def product(x: Tensor) -> tuple[Product, Variant]:
    module = Product()
    (recording,) = record(module, (x,), {}, is_leaf=lambda module: False).recordings[""]
    return module, Variant.of(recording)


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient_are_bitwise_equal(name: str) -> None:
    example = build(name)
    original = copy.deepcopy(example.model)
    keys = list(original.state_dict())
    model = capture(example.model, **example.batch)
    assert_same(train_step(model, example.batch), train_step(original, example.batch))
    assert list(model.state_dict()) == keys
    assert all(found.num_hits > 0 and found.num_misses == 0 for found in records(model).values())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), original.buffers()))

    other = image_batch(3) if name == "resnet" else token_batch(3, 9)
    assert_same(train_step(model, other), train_step(original, other))
    # sizes that an opaque child gives are numbers to its caller: the root of a model whose mask depends on data
    missed = [path for path, found in records(model).items() if found.num_misses]
    assert missed == ([""] if name.endswith("sdpa") else [])

    with torch.no_grad():
        logits = model.eval()(**example.batch)["logits"]
        assert torch.equal(logits, original.eval()(**example.batch)["logits"])


@pytest.mark.parametrize("name", ["gpt2-eager", "llama-eager"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("enable_first", [False, True])
def test_gradient_checkpointing_recomputes_with_captured_code(
    name: str, use_reentrant: bool, enable_first: bool
) -> None:
    example = build(name)
    original = copy.deepcopy(example.model)
    options = {"use_reentrant": use_reentrant}
    if enable_first:
        example.model.gradient_checkpointing_enable(options)
    model = capture(example.model, **example.batch)
    model.gradient_checkpointing_enable(options)
    original.gradient_checkpointing_enable(options)

    torch.manual_seed(3)
    loss = model(**example.batch)["loss"]
    assert len(records(model)) == (10 if name == "gpt2-eager" else 16)
    layers = [found for path, found in records(model).items() if path.endswith((".attn", ".self_attn"))]
    assert [layer.num_hits for layer in layers] == [1, 1]
    loss.backward()
    assert [layer.num_hits for layer in layers] == [2, 2]
    assert all(layer.num_misses == 0 for layer in layers)
    assert_same(train_step(model, example.batch), train_step(original, example.batch))


@pytest.mark.parametrize("name", ["gpt2-eager", "llama-eager"])
def test_under_autocast_and_after_a_change_of_dtype_the_original_runs(name: str) -> None:
    """Graphs recorded in fp32 hold fp32 constants and dtypes: neither is a call that they stand for."""
    example = build(name)
    original = copy.deepcopy(example.model)
    model = capture(example.model, **example.batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = train_step(model, example.batch), train_step(original, example.batch)
    assert actual[1].dtype == expected[1].dtype
    assert_same(actual, expected)
    assert num_hits(model) == 0
    model.to(torch.bfloat16), original.to(torch.bfloat16)
    assert_same(train_step(model, example.batch), train_step(original, example.batch))
    assert not any(found.num_hits for path, found in records(model).items() if path.endswith("mlp"))


def test_two_phases_follow_the_clock() -> None:
    @dataclass
    class Steps:
        phase: int = 0

    x, clock = torch.randn(2, 4), Steps()
    module, variant = product(x)
    expected = module(x)
    install(module, [], phase=0, clock=clock)
    install(module, [variant], phase=2)
    found = captured(module)
    assert found is not None
    for phase, hits in ((0, 0), (1, 0), (2, 1), (3, 1)):
        clock.phase = phase
        assert torch.equal(module(x), expected)
        assert (found.num_hits, found.num_misses) == (hits, 0)


def test_variants_are_tried_in_order_and_the_first_miss_is_kept() -> None:
    x = torch.randn(2, 4)
    module, many = product(x)
    _, one = product(torch.randn(1, 4))
    install(module, [many, one])
    found = captured(module)
    assert found is not None
    for rows in (2, 1, 5, 0):
        module(torch.randn(rows, 4))
    assert (found.num_hits, found.num_misses) == (3, 1)
    assert found.first_miss == "x has shape (0, 4), recorded (s0, 4)"


def test_another_graph_is_what_runs() -> None:
    x = torch.randn(2, 4)
    module = Product()
    (recording,) = record(module, (x,), {}, is_leaf=lambda module: False).recordings[""]
    expected = 2 * module(x)
    graph = fx.Graph()
    graph.output(graph.graph_copy(recording.graph, {}))
    (output,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        doubled = graph.call_function(torch.mul, (output.args[0][0], 2))  # type: ignore[index]
    output.args = ((doubled,),)
    install(module, [Variant.of(recording, graph)])
    assert torch.equal(module(x), expected)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


early = Doubled.apply


class WithFunction(nn.Module):
    def __init__(self, apply: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.apply_ = apply

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(x)
        y = self.apply_(y) if self.apply_ else Doubled.apply(y)
        return {"loss": y.square().sum(), "logits": y}


@pytest.mark.parametrize(("apply", "is_captured"), [(None, True), (early, False)])
def test_backward_of_an_autograd_function_is_not_lost(apply: Any, is_captured: bool) -> None:
    module, batch = WithFunction(apply), {"x": torch.randn(2, 4)}
    original = copy.deepcopy(module)
    capture(module, **batch)
    assert (captured(module) is not None) == is_captured
    assert_same(train_step(module, batch), train_step(original, batch))


def test_error_inside_no_grad_leaves_grad_mode_as_it_was() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            torch._C._set_grad_enabled(False)
            y = self.child(x)
            torch._C._set_grad_enabled(True)
            return y

    module = capture(Careless(), x=torch.randn(2, 4))

    def fail(*_: object) -> None:
        raise RuntimeError("from a hook")

    handle = module.child.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="from a hook"):
        module(x=torch.randn(2, 4))
    assert torch.is_grad_enabled()
    handle.remove()
    assert not module(x=torch.randn(2, 4)).requires_grad
    assert num_hits(module) == 2


def test_hooks_of_captured_modules_fire_once() -> None:
    example = build("llama-eager")
    model = capture(example.model, **example.batch)
    calls: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: calls.append(path))
        module.register_full_backward_hook(lambda *_, path=path: calls.append(f"{path} backward"))
    train_step(model, example.batch)
    assert calls.count("model.layers.1.mlp") == 1
    assert calls.count("model.layers.1.mlp backward") == 1


# -- the same module ---------------------------------------------------------------------------------------------------


def test_class_signature_and_isinstance_are_unchanged() -> None:
    example = build("gpt2-eager")
    signature = inspect.signature(example.model.forward)
    cls = type(example.model)
    model = capture(example.model, **example.batch)
    assert inspect.signature(model.forward) == signature
    assert isinstance(model, cls)
    assert (type(model).__name__, type(model).__qualname__, type(model).__module__) == (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    assert captured_class(cls) is type(model)
    assert model.forward.__doc__ == cls.forward.__doc__


def test_uninstall_gives_the_class_back() -> None:
    x = torch.randn(2, 4)
    module, variant = product(x)
    state = set(vars(module))
    install(module, [variant])
    uninstall(module)
    assert type(module) is Product
    assert set(vars(module)) == state
    uninstall(module)


def test_uninstall_under_a_wrapper_of_the_class() -> None:
    x = torch.randn(2, 4)
    module, variant = product(x)
    install(module, [variant])
    module.__class__ = type("Wrapped", (type(module),), {})
    uninstall(module)
    assert type(module).__name__ == "Wrapped"
    module(x)
    install(module, [variant])
    module(x)
    assert num_hits(module) == 1


def test_save_pretrained_and_generate(tmp_path: Path) -> None:
    example = build("gpt2-eager")
    original = copy.deepcopy(example.model).eval()
    model = capture(example.model, **example.batch).eval()
    prompt = {name: tensor[:1, :6] for name, tensor in example.batch.items() if name != "labels"}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    assert torch.equal(model.generate(**prompt, **options), original.generate(**prompt, **options))

    model.save_pretrained(tmp_path)
    loaded = captured_class(type(original)).__mro__[1].from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert loaded.config.architectures == ["GPT2LMHeadModel"]
    assert torch.equal(loaded(**example.batch)["logits"], original(**example.batch)["logits"])


def test_saving_and_generating_do_not_end_the_capture(tmp_path: Path) -> None:
    example = build("gpt2-eager")
    model = capture(example.model, **example.batch)
    model.save_pretrained(tmp_path)
    model.eval().generate(example.batch["input_ids"][:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
    misses = {path: found.num_misses for path, found in records(model).items()}
    train_step(model.train(), example.batch)
    assert {path: found.num_misses for path, found in records(model).items()} == misses


@pytest.mark.parametrize("name", ["gpt2-eager", "llama-eager", "resnet"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_call_their_own_children(name: str, how: str) -> None:
    example = build(name)
    expected = train_step(copy.deepcopy(example.model), example.batch)
    model = capture(example.model, **example.batch)
    model(**example.batch)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for buffer in model.buffers():
            buffer.zero_()
    twin.load_state_dict(build(name).model.state_dict())
    before, untouched = num_hits(twin), num_hits(model)
    assert_same(train_step(twin, example.batch), expected)
    assert type(twin) is type(model)
    assert num_hits(twin) - before == len(records(twin)) == len(records(model))
    assert num_hits(model) == untouched


def test_pickle_drops_a_capture_that_names_a_local_function() -> None:
    class Local(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    module, x = Product(), torch.randn(2, 4)
    (recording,) = record(module, (x,), {}, is_leaf=lambda module: False).recordings[""]
    output = next(iter(reversed(recording.graph.nodes)))
    with recording.graph.inserting_before(output):
        local = recording.graph.call_function(lambda value: Local.apply(value), (output.args[0][0],))
    output.args = ((local,),)
    install(module, [Variant.of(recording)])
    expected = module(x)
    twin = pickle.loads(pickle.dumps(module))
    assert type(twin) is Product
    assert captured(twin) is None
    assert torch.equal(twin(x), expected)
    assert captured(copy.deepcopy(module)) is not None


def test_failing_variant_of_a_shared_class_leaves_other_instances_alone() -> None:
    x = torch.randn(2, 4)
    module, variant = product(x)
    other = Product()
    install(module, [variant])
    assert type(other) is Product

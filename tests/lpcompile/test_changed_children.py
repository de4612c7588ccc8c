"""Children that are changed after compiling: the model calls what is there now, whichever it was compiled with."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile
from lpcompile.api import run_state


class LoRA(nn.Module):
    """A wrapper that takes the input alone, as peft's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.down(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.more = nn.ModuleList()
        self.named = nn.ModuleDict({"c": nn.Linear(16, 16)})
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x) + self.b(x))
        for layer in (*self.layers, *self.more, *self.named.values()):
            y = y + layer(x)
        return y @ y.mT


def _fresh(seed: int = 1) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(16, 16)


def _wrap(model: Net) -> None:
    torch.manual_seed(1)
    model.a = LoRA(model.a)  # type: ignore[assignment]


def _set(name: str, make: Callable[[], nn.Module]) -> Callable[[Net], None]:
    return lambda model: setattr(model, name, make())


def _own_forward(model: Net) -> None:
    model.a.forward = lambda t: t * 2  # type: ignore[assignment, method-assign]


def _delete(model: Net) -> None:
    del model.layers[1]


def _swap(model: Net) -> None:
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


CHANGES: dict[str, Callable[[Net], object]] = {
    "wrapped": _wrap,
    "replaced": _set("a", _fresh),
    "another kind": _set("norm", nn.Identity),
    "a forward of its own": _own_forward,
    "deleted": _delete,
    "swapped": _swap,
    "appended": lambda model: model.layers.append(_fresh()),
    "appended to none": lambda model: model.more.append(_fresh()),
    "added by name": lambda model: model.named.update({"d": _fresh()}),
}


def _through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "torch.save": _through_torch_save,
    **{f"pickle {n}": lambda model, n=n: pickle.loads(pickle.dumps(model, n)) for n in (2, 3, 4, 5)},
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("copied", ["itself", "deepcopy", "torch.save"])
@pytest.mark.parametrize("name", CHANGES)
def test_the_model_calls_what_is_there_now(name: str, copied: str) -> None:
    torch.manual_seed(0)
    original, x = Net(), torch.randn(4, 16)
    model = COPIES[copied](lpcompile(copy.deepcopy(original), "fp32-emulated", example_inputs=(x,)))
    assert torch.equal(model(x), original(x))
    for each in (original, model):
        CHANGES[name](each)  # type: ignore[arg-type]
    assert torch.equal(model(x), original(x))


def test_a_longer_sequential_runs_what_was_appended() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), Net()), torch.randn(4, 16)
    lpcompile(model, "hfp8", example_inputs=(x,))
    model.append(nn.Flatten())
    assert model(x).shape == (4, 4)
    before = model(x)
    model[1].layers.append(_fresh())
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_compute_the_same(copied: str) -> None:
    model, x = Net(), torch.randn(4, 16)
    lpcompile(model.eval(), "hfp8", example_inputs=(x,))
    with torch.no_grad():
        expected = model(x)
        twin = COPIES[copied](model)
        calls = run_state(twin).gemm_calls
        assert torch.equal(twin(x), expected)
    assert run_state(twin).gemm_calls == calls + 6


def test_a_model_in_training_goes_through_torch_save() -> None:
    model, x = Net(), torch.randn(4, 16)
    lpcompile(model, "hfp8", example_inputs=(x,))
    twin = _through_torch_save(model)
    for each in (model, twin):
        each(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, *CHANGES])
def test_torch_compile_sees_the_change(name: str | None) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 16)
    lpcompile(model, "hfp8", example_inputs=(x,))
    if name is not None:
        CHANGES[name](model)
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)

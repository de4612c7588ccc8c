"""Shapes: one recording holds for other batches and lengths, never where the forward does otherwise."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpcompile.capture.recorder import record
from lpcompile.capture.variants import CapturedForward, Variant, captured, install
from tests.models_for_tests import build, token_batch

Forward = Callable[..., Any]


class Wrapped(nn.Module):
    """A forward written as a function of the module and its arguments."""

    def __init__(self, function: Forward, **children: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
        for name, child in children.items():
            self.add_module(name, child)
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self, *args, **kwargs)


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    result = record(model, args, kwargs, is_leaf=lambda module: type(module).__name__ == "Conv1D")
    assert not result.opaque
    modules = dict(model.named_modules())
    for path, recordings in result.recordings.items():
        install(modules[path], [Variant.of(recording) for recording in recordings])
    return model


def found_in(module: nn.Module) -> CapturedForward:
    found = captured(module)
    assert found is not None
    return found


def is_hit(model: nn.Module, function: Forward, *args: Any) -> bool:
    """Whether the recording held for the call; in either case the result is that of the function."""
    before = found_in(model).num_hits
    torch.testing.assert_close(model(*args), function(model, *args), rtol=0, atol=0)
    return found_in(model).num_hits == before + 1


def attention(self: nn.Module, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    q = (x @ self.weight).view(batch, length, 2, width // 2).transpose(1, 2)
    scores = q @ q.transpose(-1, -2) / math.sqrt(width // 2)
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    y = scores.masked_fill(~keep, float("-inf")).softmax(-1) @ q
    return y.transpose(1, 2).reshape(batch * length, -1)


def branch(self: nn.Module, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 8 else x * 3


def loop(self: nn.Module, x: Tensor) -> Tensor:
    state = torch.zeros_like(x[0])
    for step in range(x.size(0)):
        state = state * 0.5 + x[step]
    return state


def chunks(self: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in x.split(3)])


def by_length(self: nn.Module, x: Tensor) -> Tensor:
    return x.sum() / len(x)


def product_of_sizes(self: nn.Module, x: Tensor) -> Tensor:
    return x.new_zeros(math.prod(x.shape)) + x.reshape(-1) / x.numel()


def inverse_root(self: nn.Module, x: Tensor) -> Tensor:
    return x * x.shape[0] ** -0.5 / x.shape[1] + (x.shape[0] / 2 > 1.4)


def num_bytes(self: nn.Module, x: Tensor) -> Tensor:
    return x / x.nbytes


def two(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x + y


@pytest.mark.parametrize(
    ("function", "recorded", "hits", "misses"),
    [
        (attention, (2, 5, 4), [(2, 5, 4), (3, 7, 4), (4, 2, 4)], [(1, 5, 4), (2, 1, 4)]),
        (attention, (1, 5, 4), [(1, 5, 4), (1, 9, 4)], [(2, 5, 4)]),
        (branch, (9,), [(9,), (30,)], [(8,), (2,), (1,)]),
        (branch, (8,), [(8,), (2,)], [(9,), (1,)]),
        (loop, (5, 2), [(5, 2), (5, 3)], [(4, 2), (6, 2)]),
        (chunks, (7,), [(7,)], [(6,), (10,)]),
        (by_length, (3,), [(3,)], [(4,)]),
        (inverse_root, (3, 2), [(3, 2)], [(4, 2)]),
        (num_bytes, (3, 2), [(3, 2)], [(4, 2)]),
        (product_of_sizes, (2, 3), [(2, 3), (5, 7)], [(1, 3)]),
    ],
)
def test_holds_where_the_forward_does_the_same_and_only_there(
    function: Forward, recorded: tuple[int, ...], hits: list[tuple[int, ...]], misses: list[tuple[int, ...]]
) -> None:
    model = capture(Wrapped(function), torch.randn(recorded))
    assert all(is_hit(model, function, torch.randn(shape)) for shape in hits)
    assert not any(is_hit(model, function, torch.randn(shape)) for shape in misses)


def test_broadcasting_is_another_graph_condition() -> None:
    model = capture(Wrapped(two), torch.randn(3, 4), torch.randn(3, 4))
    assert is_hit(model, two, torch.randn(5, 6), torch.randn(5, 6))
    assert not is_hit(model, two, torch.randn(5, 6), torch.randn(1, 6))
    (recording,) = record(
        Wrapped(two), (torch.randn(3, 4), torch.randn(1, 4)), {}, is_leaf=lambda module: False
    ).recordings[""]
    assert [fact.shape for fact in recording.guard.leaves] == [("s0", "s1"), (1, "s1")]  # type: ignore[union-attr]


def test_condition_that_a_call_breaks_is_said() -> None:
    model = capture(Wrapped(branch), torch.randn(9))
    model(torch.randn(4))
    assert found_in(model).first_miss == "the sizes (4,) do not fit s0 > 8"


def test_size_is_an_operand_from_parent_to_child_and_back() -> None:
    def make(self: nn.Module, x: Tensor, length: int) -> tuple[Tensor, int]:
        return torch.arange(length) + x.sum(), length * 2

    def parent(self: nn.Module, x: Tensor) -> Tensor:
        y, double = self.child(x, x.shape[1])
        return y.new_ones(double) * y.sum()

    model = Wrapped(parent, child=Wrapped(make))
    capture(model, torch.randn(2, 3))
    for shape in ((2, 3), (5, 8)):
        assert model(x := torch.randn(shape)).shape == (2 * shape[1],)
        assert torch.equal(model.child(x, shape[1])[0], torch.arange(shape[1]) + x.sum())
    assert (found_in(model).num_hits, found_in(model).num_misses) == (2, 0)
    assert (found_in(model.child).num_hits, found_in(model.child).num_misses) == (4, 0)
    assert model.child(torch.randn(2, 3), 1)[1] == 2
    assert "recorded" in (found_in(model.child).first_miss or "")


def test_condition_of_a_child_is_one_of_its_parent() -> None:
    def shrink(self: nn.Module, x: Tensor) -> Tensor:
        return x[:4] if x.shape[0] > 8 else x

    def parent(self: nn.Module, x: Tensor) -> Tensor:
        y = self.child(x)
        return y.view(y.shape[0], 1) * 2

    model = capture(Wrapped(parent, child=Wrapped(shrink)), torch.randn(9))
    assert model(torch.randn(5)).shape == (5, 1)
    assert found_in(model).num_misses == 1
    assert model(torch.randn(12)).shape == (4, 1)
    assert found_in(model).num_hits == 1


def test_one_tensor_given_twice() -> None:
    model, x = Wrapped(two), torch.randn(3, 4)
    capture(model, x, x)
    y = torch.randn(7, 2)
    assert is_hit(model, two, y, y)


def test_leaf_that_python_does_not_see_into_fixes_the_sizes() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.hidden(x)
        return y * y.shape[0]

    model = capture(Wrapped(forward, hidden=torch.jit.script(nn.ReLU())), torch.randn(3, 4))
    assert is_hit(model, forward, torch.randn(3, 4))
    assert not is_hit(model, forward, torch.randn(5, 4))


def test_shape_changed_in_place_is_not_read_too_early() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = x * 1
        y.unsqueeze_(0)
        return y.expand(3, *y.shape[1:]) + x.sum()

    model = capture(Wrapped(forward), torch.randn(2, 5))
    assert is_hit(model, forward, torch.randn(4, 6))


def test_forward_that_cannot_bear_symbols_is_recorded_with_fixed_sizes() -> None:
    def picky(self: nn.Module, x: Tensor) -> Tensor:
        return x * {3: 2.0}[x.shape[0]] if type(x.shape[0]) is int else x[object()]  # type: ignore[index]

    model = capture(Wrapped(picky), torch.randn(3))
    assert is_hit(model, picky, torch.randn(3))
    assert found_in(model).variants[0].guard.leaves[0].shape == (3,)  # type: ignore[union-attr]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_hold_for_other_sizes(copied: Callable[[nn.Module], nn.Module]) -> None:
    example = build("llama-eager")
    twin = copied(capture(example.model, **example.batch))
    other = token_batch(3, 7)
    assert torch.equal(twin(**other)["logits"], build("llama-eager").model(**other)["logits"])
    assert found_in(twin.get_submodule("model.layers.1.self_attn")).num_misses == 0


def test_recording_on_meta_allocates_nothing_and_draws_nothing() -> None:
    with torch.device("meta"):
        block = nn.Sequential(nn.Linear(1 << 20, 1 << 20), nn.Dropout(0.5), nn.BatchNorm1d(1 << 20))
        model = Wrapped(lambda self, x: F.dropout(self.block(x), 0.5) @ x.transpose(0, 1), block=block)
        x = torch.empty(8, 1 << 20)
    state = torch.get_rng_state()
    (recording,) = record(model, (x,), {}, is_leaf=lambda module: False).recordings[""]
    assert recording.guard.leaves[0].shape == ("s0", 1 << 20)  # type: ignore[union-attr]
    assert torch.equal(state, torch.get_rng_state())
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_truth_of_a_meta_tensor_is_false_and_the_children_are_recorded() -> None:
    child = Wrapped(lambda self, x: x @ self.weight)
    model = Wrapped(lambda self, x: -self.child(x) if x.sum() > 0 else self.child(x), child=child).to("meta")
    result = record(model, (torch.empty(3, 4, device="meta"),), {}, is_leaf=lambda module: False)
    assert "__bool__ was taken for False" in result.opaque[""].reason
    assert list(result.recordings) == ["child"]


@pytest.mark.parametrize(
    ("read", "name", "taken"),
    [
        (lambda x: x.sum().item(), "item", "1.0"),
        (lambda x: int(x.sum()), "__int__", "1"),
        (lambda x: float(x.sum()), "__float__", "1.0"),
        (lambda x: x.long().sum().tolist(), "tolist", "1"),
        (lambda x: x[0].tolist()[1], "tolist", "ones"),
        (lambda x: len(range(x.long().sum())), "__index__", "1"),
        (lambda x: 2.0 if torch.equal(x, x) else 1.0, "equal", "True"),
    ],
)
def test_data_of_a_meta_tensor_is_taken_for_ones_and_told_with_its_line(read: Forward, name: str, taken: str) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        factor = read(x)
        return self.child(x) * factor

    model = Wrapped(forward, child=Wrapped(lambda self, x: x @ self.weight)).to("meta")
    result = record(model, (torch.empty(3, 4, device="meta"),), {}, is_leaf=lambda module: False)
    assert result.opaque[""].reason == f"depends on data, which meta tensors lack: {name} was taken for {taken}"
    line = forward.__code__.co_firstlineno + 1
    assert result.opaque[""].where == f"{__file__}:{line}"
    assert list(result.recordings) == ["child"]


def test_operation_without_a_meta_kernel_fixes_the_sizes_and_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """torch logs two tracebacks for each call of grouped_mm in fp32 on tensors without data."""

    def grouped(self: nn.Module, x: Tensor) -> Tensor:
        ends = torch.tensor([1, x.shape[0]], dtype=torch.int32)
        return F.grouped_mm(x, self.weight.expand(2, 4, 4), offs=ends)

    model = Wrapped(grouped)
    result = record(model, (torch.randn(3, 4),), {}, is_leaf=lambda module: False)
    assert "" in result.recordings or "" in result.opaque
    assert not [entry for entry in caplog.records if entry.name.startswith("torch._subclasses")]

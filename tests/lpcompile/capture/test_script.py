"""Script: blocks that do the same share one graph, those that only look the same do not; depth costs no shadows."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile.capture import bystanders
from lpcompile.capture.precedents import Precedents
from lpcompile.capture.recorder import record
from lpcompile.capture.recording import Recording, merged
from lpcompile.capture.shapes import Shapes
from lpcompile.capture.variants import Variant, captured, install
from tests.models_for_tests import tiny_gpt2, tiny_llama, token_batch

WORLD: dict[str, Any] = {}


class Block(nn.Module):
    """y = x @ weight and what `function` makes of it; `number` is its place in the stack."""

    count = 0

    def __init__(self, function: Callable[..., Any], number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(number)))
        self.other = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(-1 - number)))
        self.number = number
        self.config = SimpleNamespace(scale=2.0)
        self._function = function

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        return self._function(self, x @ self.weight, *rest)


class Stack(nn.Module):
    def __init__(self, function: Callable[..., Any], depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)  # what the first block gets is of the kind that it gives: known width, a gradient
        self.blocks = nn.ModuleList([Block(function, number) for number in range(depth)])
        for block in self.blocks:
            block.register_forward_pre_hook(tick)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _world() -> None:
    WORLD.clear()
    WORLD.update(scale=1.0, limits=[])
    Block.count = 0


def recordings_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[Recording]:
    found = record(model, args, kwargs, is_leaf=lambda module: False).recordings
    return [found[path][0] for path in found if path.count(".") == 1]


def example(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4)


def tick(*_: object) -> None:
    """A hook before each block's forward: a forward that moved the world itself would have no graph."""
    WORLD["scale"] += 1
    Block.count += 1


def num_graphs(recordings: list[Recording]) -> int:
    return len({id(recording.graph) for recording in recordings})


def plain(self: Block, y: Tensor) -> Tensor:
    return y.relu() + y.view(y.shape[0] * 2, -1).sum() / y.shape[0]


def by_number(self: Block, y: Tensor) -> Tensor:
    return y.relu() if self.number % 2 else y.sin()


def by_number_as_constant(self: Block, y: Tensor) -> Tensor:
    return y * (1.0 + self.number)


def class_counter(self: Block, y: Tensor) -> Tensor:
    return y * type(self).count


def world_counter(self: Block, y: Tensor) -> Tensor:
    return y * WORLD["scale"] if WORLD["scale"] < 4 else y.sin()


def sign_of_zero(self: Block, y: Tensor) -> Tensor:
    return y.relu() * (0.0 if WORLD["scale"] % 2 else -0.0)


def other_weight(self: Block, y: Tensor) -> Tensor:
    return y @ (self.weight if vars(self)["number"] % 2 else self.other)


def one_more_step(self: Block, y: Tensor) -> Tensor:
    y = y.relu()
    return y if WORLD["scale"] < 3 else y.sin()


def swapped(self: Block, y: Tensor) -> Tensor:
    a, b = y.sin(), y.cos()
    return a - b if WORLD["scale"] % 2 else b - a


def test_equal_blocks_share_graph_and_guard() -> None:
    found = recordings_of(Stack(plain), example())
    assert num_graphs(found) == 1
    assert len({id(recording.guard) for recording in found}) == 1
    assert [recording.path for recording in found] == [f"blocks.{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("function", "graphs"),
    [
        (by_number, 2),
        (by_number_as_constant, 4),
        (class_counter, 4),
        (world_counter, 3),
        (sign_of_zero, 2),
        (other_weight, 2),
        (one_more_step, 2),
        (swapped, 2),
    ],
)
def test_blocks_that_only_look_alike_have_graphs_of_their_own(function: Callable[..., Any], graphs: int) -> None:
    """And each graph computes what the forward computed in that call."""
    model, x = Stack(function), example()
    original = copy.deepcopy(model)
    found = recordings_of(model, x)
    assert len({str(recording.graph) for recording in found}) == graphs
    assert num_graphs(found) >= graphs
    _world_again()
    expected = original(x)
    for block, recording in zip(model.blocks, found):
        install(block, [Variant.of(recording)])
    _world_again()
    actual = model(x)
    assert torch.equal(actual, expected)
    actual.sum().backward(), expected.sum().backward()
    for ours, theirs in zip(model.parameters(), original.parameters()):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert all(captured(block).num_hits == 1 for block in model.blocks)  # type: ignore[union-attr]


def _world_again() -> None:
    WORLD.update(scale=1.0)
    Block.count = 0


def test_configuration_changed_between_two_calls() -> None:
    model = Stack(lambda self, y: y * self.config.scale)
    config = model.blocks[0].config
    for block in model.blocks:
        block.config = config
    model.blocks[2].register_forward_pre_hook(lambda *_: setattr(config, "scale", 3.0))
    found = recordings_of(model, example())
    assert [dict(r.guard.attributes)["config.scale"].value for r in found] == [2.0, 2.0, 3.0, 3.0]
    assert found[0].graph is found[1].graph
    assert found[2].graph is found[3].graph is not found[0].graph
    assert config.scale == 2.0


def test_condition_that_one_block_makes_is_in_no_other_guard() -> None:
    def limited(self: Block, y: Tensor) -> Tensor:
        if WORLD["limits"] and y.shape[0] <= WORLD["limits"][-1]:
            return y.sin()
        return y.relu()

    model = Stack(limited, depth=5)
    model.blocks[1].register_forward_pre_hook(lambda *_: WORLD["limits"].append(3))
    model.blocks[1].register_forward_hook(lambda *_: WORLD["limits"].clear())
    found = recordings_of(model, example(6))
    assert [recording.guard.conditions for recording in found] == [(), ("s0 > 3",), (), (), ()]
    assert num_graphs([found[i] for i in (2, 3, 4)]) == 1


def test_condition_that_only_the_first_makes_is_kept_by_those_that_follow_it() -> None:
    """Narrower than need be: the operations are the same, and conditions are compared only with those of the script."""

    def limited(self: Block, y: Tensor) -> Tensor:
        return y.relu() if WORLD["scale"] > 2 or y.shape[0] > 3 else y.sin()

    model = Stack(limited, depth=3)
    assert [r.guard.conditions for r in recordings_of(model, example(6))] == [("s0 > 3",)] * 3


def test_number_where_another_block_reads_a_size() -> None:
    def view(self: Block, y: Tensor) -> Tensor:
        return y.view(3 if WORLD["scale"] == 3 else y.shape[0], 4)

    found = recordings_of(Stack(view), example())
    assert [recording.guard.leaves[0].shape for recording in found] == [("s0", 4), (3, 4), (3, 4), (3, 4)]  # type: ignore[union-attr]
    assert found[1].graph is not found[0].graph


def test_conditions_reach_the_caller_for_each_of_equal_blocks() -> None:
    def shrink(self: Block, y: Tensor) -> Tensor:
        return y[2:] if y.shape[0] > 2 else y

    model = Stack(shrink, depth=3)
    (root,) = record(model, (torch.randn(9, 4),), {}, is_leaf=lambda module: False).recordings[""]
    for rows in (7, 8, 20):
        assert root.guard.check(model, (torch.randn(rows, 4),), {}) is None
    assert "do not fit" in str(root.guard.check(model, (torch.randn(6, 4),), {}))


def test_shape_changed_in_place_is_followed_by_no_other_block() -> None:
    def grow(self: Block, y: Tensor) -> Tensor:
        y = y * 1
        before = y.shape[0]
        y.unsqueeze_(0)
        return y.view(y.shape[1], 4) / before + y.shape[0]

    model = Stack(grow)
    original = copy.deepcopy(model)
    found = recordings_of(model, example())
    for block, recording in zip(model.blocks, found):
        install(block, [Variant.of(recording)])
    x = example()
    assert torch.equal(model(x), original(x))
    assert all(captured(block).num_hits == 1 for block in model.blocks)  # type: ignore[union-attr]


def test_arguments_that_are_one_tensor_or_two() -> None:
    class Pairs(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = x * 2
            return self.blocks[0](x, x) + self.blocks[1](x, y) + self.blocks[2](y, y) + self.blocks[3](y, x)

    found = recordings_of(Pairs(lambda self, y, z: y + z), example())
    assert found[0].graph is found[2].graph is not found[1].graph
    assert found[1].graph is found[3].graph


def test_tied_weights_are_another_graph() -> None:
    model = Stack(lambda self, y: y @ self.other)
    model.blocks[2].other = model.blocks[2].weight
    found = recordings_of(model, example())
    assert found[0].graph is found[1].graph
    assert [node.target for node in found[2].graph.nodes if node.op == "get_attr"] == ["weight"]


def test_nested_blocks_of_one_class_do_not_meet() -> None:
    pairs = [nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ReLU()) for _ in range(3)]
    found = record(nn.Sequential(nn.Linear(4, 4), *pairs), (example(),), {}, is_leaf=lambda module: False).recordings
    assert found["1"][0].graph is found["3"][0].graph
    assert found["1.0"][0].graph is found["3.0"][0].graph
    assert found["1"][0].graph is not found["1.0"][0].graph


def test_train_and_evaluation_are_one_recording_where_they_do_the_same() -> None:
    model, precedents = tiny_gpt2(), Precedents()
    batch = token_batch()
    by_mode = [
        record(model.train(mode), (), batch, is_leaf=lambda module: False, precedents=precedents).recordings
        for mode in (True, False)
    ]
    both = {path: merged(by_mode[0][path], by_mode[1][path]) for path in by_mode[0]}
    (norm_free,) = both["transformer.h.1"]
    assert norm_free.guard.training is None
    assert len(both["transformer.h.1.attn"]) == 2, "dropout"
    assert {recording.guard.training for recording in both["transformer.h.1.attn"]} == {True, False}


def test_shadows_do_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    original = Shapes._unseen
    monkeypatch.setattr(Shapes, "_unseen", lambda self: (runs.append(1), original(self))[1])

    def num_runs(depth: int) -> int:
        runs.clear()
        model = tiny_llama(**{})
        model.model.layers.extend([copy.deepcopy(model.model.layers[1]) for _ in range(depth - 2)])
        model.config.num_hidden_layers = depth
        record(model, (), token_batch(), is_leaf=lambda module: False)
        return len(runs)

    two, eight = num_runs(2), num_runs(8)
    assert eight - two <= 6, "one per layer at most, for what the layer hands to its caller"


def test_snapshots_grow_linearly_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    original = bystanders._Saved.__init__
    monkeypatch.setattr(bystanders._Saved, "__init__", lambda self, m: (taken.append(1), original(self, m))[1])

    def num_taken(depth: int) -> int:
        taken.clear()
        recordings_of(Stack(plain, depth), example())
        return len(taken)

    four, eight, sixteen = num_taken(4), num_taken(8), num_taken(16)
    assert sixteen - eight == 2 * (eight - four)

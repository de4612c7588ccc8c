"""Compiled code draws the bits of eager code by whatever door it is entered, in every call of one micro-batch, and
compiles nothing anew for it.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lpcompile import advance, compile_joint, lpcompile
from lpcompile.api import run_state
from tests.lpcompile.test_stochastic_calls import Net, are_same, inputs, made, policy, share_of_equal
from tests.machine_facts import needs_compiler

Frontend = Literal["torch.compile", "joint"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Any:
    return torch.compile(function, backend=backend, fullgraph=True)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("role", ["fwd", "bwd", "grad"])
def test_another_door_than_the_root_draws_the_bits_of_eager_code(role: str, times: int) -> None:
    """Three calls a micro-batch, over two steps and one that is taken again; one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    x, results = inputs(), []
    for is_compiled in (False, True):
        model = made(policy(role), times=times)
        encode = _compiled(model.encode, counter) if is_compiled else model.encode
        found = []
        for step in (0, 1, 0):
            advance(model, to_step=step)
            for _ in range(3):
                y = encode(x)
                found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
        results.append(found)
    eager, compiled = results
    assert all(torch.equal(a, b) for one, other in zip(eager, compiled) for a, b in zip(one, other))
    assert all(torch.equal(a, b) for one, other in zip(compiled[:3], compiled[6:]) for a, b in zip(one, other))
    moved = 1 if role == "bwd" else 0 if role == "fwd" else -4  # x's gradient, y, the weight of the first layer
    assert share_of_equal(compiled[0][moved], compiled[1][moved]) < 0.05
    assert counter.frame_count == 1


@pytest.mark.parametrize("door", ["root", "encode"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_forwards_without_gradients_draw_the_bits_of_eager_code(door: str, context: Any) -> None:
    x, results = inputs().detach(), []
    for is_compiled in (False, True):
        model = made(policy("fwd"))
        function = model if door == "root" else model.encode
        run = _compiled(function) if is_compiled else function
        with context():
            results.append([run(x) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert share_of_equal(results[1][0], results[1][1]) < 0.05


def test_what_draws_without_gradients_moves_no_bits_of_training() -> None:
    """As a run that evaluates and one that does not, and a run that is resumed."""
    x, results = inputs(), []
    for evaluates in (False, True):
        model = made(policy("fwd"))
        compiled = _compiled(model)
        if evaluates:
            with torch.no_grad():
                compiled(x)
                compiled(x)
        results.append([compiled(x).detach(), compiled(x).detach()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert share_of_equal(*results[0]) < 0.05


def test_compiled_and_eager_calls_of_one_micro_batch_draw_their_own_bits() -> None:
    x, results = inputs(), []
    for is_compiled in (False, True):
        model = made(policy("fwd"))
        root, encode = (_compiled(model), _compiled(model.encode)) if is_compiled else (model, model.encode)
        results.append([each(x).detach() for each in (root, encode, model.encode, encode, root, model.encode)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert len({float(y.sum()) for y in results[1]}) == 6


def test_a_copy_of_a_model_that_was_compiled_counts_by_itself() -> None:
    x, model = inputs(), made(policy("fwd"))
    encode = _compiled(model.encode)
    first = encode(x).detach()
    copied = copy.deepcopy(model)
    advance(copied, to_step=0)
    encode(x)
    assert torch.equal(_compiled(copied.encode)(x), first)


class Broken(Net):
    """A graph break between two calls of a layer, which are one piece of code."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.a(x)
            torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize("frontend", ["torch.compile", "joint"])
def test_pieces_between_graph_breaks_draw_the_bits_of_eager_code(frontend: Frontend) -> None:
    x, results = inputs(), []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model: Any = lpcompile(Broken(), policy("fwd"))
        run = model
        if is_compiled and frontend == "joint":
            run = compile_joint(model, backend="aot_eager")
        elif is_compiled:
            run = torch.compile(model, backend="aot_eager")
        results.append([run(x).detach() for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert share_of_equal(*results[1]) < 0.05


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("role", ["fwd", "bwd", "grad"])
def test_compiled_code_in_an_eager_checkpoint_recomputes_with_the_bits_of_the_first_time(kind: str, role: str) -> None:
    """Two forwards before any backward, by a door and by the root's micro-batches in between."""
    x, results = inputs(8), []
    for uses in (False, True):
        model = made(policy(role), times=2)
        encode = _compiled(model.encode)

        def run(x: Tensor, model: Net = model, encode: Any = encode, uses: bool = uses) -> Tensor:
            y: Tensor = checkpoint(encode, x, use_reentrant=kind == "reentrant") if uses else encode(x)
            return y

        state = run_state(model)
        assert state is not None
        ys = []
        for scale in (1, 2):
            state.micro_batch += 1
            ys.append(run(x * scale))
        (ys[0].square().sum() + ys[1].abs().sum()).backward()
        assert x.grad is not None
        results.append([*ys, x.grad, *(p.grad for p in model.parameters())])
        x.grad = None
    assert are_same(*results)


def test_what_is_asked_for_as_the_graph_is_called_is_not_compiled() -> None:
    """Dynamo takes every frame that runs inside of what it compiled, where it may break the graph."""
    model, x = made(policy("bwd")), inputs()
    run = torch.compile(model.encode, backend="aot_eager")
    for step in range(4):
        advance(model, to_step=step)
        for _ in range(2):
            run(x).square().sum().backward()
        if step == 0:
            seen = dict(torch._dynamo.utils.counters["frames"])
    assert dict(torch._dynamo.utils.counters["frames"]) == seen


@needs_compiler
@pytest.mark.parametrize("role", ["fwd", "bwd", "grad"])
def test_inductor_gives_casts_the_bits_of_eager_code(role: str) -> None:
    x, results = inputs(), []
    for is_compiled in (False, True):
        model = made(policy(role))
        encode = _compiled(model.encode, "inductor") if is_compiled else model.encode
        found = []
        for _ in range(2):
            grads = torch.autograd.grad(encode(x).sum(), [x, *model.parameters()], allow_unused=True)
            found += [grad for grad in grads if grad is not None]
        results.append(found)
    assert are_same(*results)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("role", ["fwd", "bwd"])
def test_inductor_gives_sums_the_bits_of_eager_code_in_every_call(role: str) -> None:
    """Of a leaf that is called twice in one graph."""
    x, results = inputs(), []
    for is_compiled in (False, True):
        model = made(policy(role, sums=True), times=2)
        encode = _compiled(model.encode, "inductor") if is_compiled else model.encode
        found = []
        for _ in range(3):
            y = encode(x)
            found.append(y.detach() if role == "fwd" else torch.autograd.grad(y.sum(), x)[0])
        results.append(found)
    assert are_same(*results)
    assert share_of_equal(results[1][0], results[1][1]) < 0.5

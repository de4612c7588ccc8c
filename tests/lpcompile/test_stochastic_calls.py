"""Every call of a product draws bits of its own, and what checkpointing runs again draws those of the first time."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lpcompile import Policy, advance, lpcompile, report
from tests.multiprocess import run_ranks

WIDTH = 64


def policy(role: str = "bwd", sums: bool = False) -> Policy:
    """Casts of one operand to e2m1, or sums in 1-6-9, that round stochastically."""
    cast = {"format": "e2m1", "rounding": "stochastic", "scale": {"granularity": "tensor", "rule": "pow2"}}
    operands = {"fwd": ("x", "w"), "bwd": ("dy", "w"), "grad": ("dy", "x")}[role]
    rule: dict[str, Any] = {"match": {}, role: {operands[0]: cast, operands[1]: "fp32"}}
    if sums:
        how = {"format": "1-6-9", "rounding": "stochastic"}
        rule = {"match": {}, role: {operands[0]: "e4m3", operands[1]: "e4m3", "accumulate": how}}
    return Policy.model_validate({"version": 1, "name": "p", "rules": [rule]})


class Net(nn.Module):
    """Two layers, one of which is called `times`; its parts by other doors than forward."""

    def __init__(self, times: int = 1, kind: str = "") -> None:
        super().__init__()
        self.a, self.b, self.times, self.kind = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), times, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind:
            y: Tensor = checkpoint(self.encode, x, use_reentrant=self.kind == "reentrant")
            return y
        return self.encode(x)

    def encode(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.a(x))
        return self.b(x)

    def training_step(self, x: Tensor) -> Tensor:
        return self.encode(x)


def made(spec: Policy | str, **options: Any) -> Net:
    torch.manual_seed(0)
    return lpcompile(Net(**options), spec)


def gradients(x: Tensor, *outputs: Tensor, keep: bool = True) -> list[Tensor]:
    """Of each output by itself, under one and the same gradient of it."""
    torch.manual_seed(1)
    dy = torch.randn_like(outputs[0])
    return [torch.autograd.grad(y, x, dy, retain_graph=keep)[0] for y in outputs]


def inputs(rows: int = 32) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()


def are_same(some: list[Any], others: list[Any]) -> bool:
    """Bits are the same where values are but for the order of a few additions: other bits move them by 1e-2."""
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(a.detach().abs().max())) for a, b in zip(some, others))


def share_of_equal(a: Tensor, b: Tensor) -> float:
    return float((a == b).double().mean())


def test_two_forwards_before_one_backward_draw_their_own_bits() -> None:
    model, x = made(policy()), inputs()
    first, second = gradients(x, model(x), model(x))
    assert share_of_equal(first, second) < 0.05


def test_the_bits_of_a_backward_are_those_of_its_forward() -> None:
    x = inputs()
    model = made(policy())
    ys = [model(x), model(x)]
    together = gradients(x, *ys)
    model = made(policy())
    assert all(torch.equal(gradients(x, model(x))[0], each) for each in together)
    model = made(policy())
    ys = [model(x), model(x)]
    advance(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(x, *ys), together))


@pytest.mark.parametrize("door", ["encode", "forward", "training_step"])
@pytest.mark.parametrize("training", [True, False])
def test_calls_that_do_not_enter_by_the_root_draw_their_own_bits(door: str, training: bool) -> None:
    model, x = made(policy()).train(training), inputs()
    first, second = (gradients(x, getattr(model, door)(x))[0] for _ in range(2))
    assert share_of_equal(first, second) < 0.05
    advance(model, to_step=0)
    assert torch.equal(gradients(x, getattr(model, door)(x))[0], first)


def test_evaluation_with_gradients_draws_its_own_bits() -> None:
    model, x = made(policy()).eval(), inputs()
    first, second = (gradients(x, model(x))[0] for _ in range(2))
    assert share_of_equal(first, second) < 0.05


def test_a_forward_without_gradients_draws_its_own_bits_and_moves_none_of_those_with() -> None:
    model, x = made(policy("fwd")), inputs()
    with torch.no_grad():
        first, second = model(x), model(x)
    assert share_of_equal(first, second) < 0.05
    after = model(x)
    advance(model, to_step=0)
    assert torch.equal(model(x), after)


@pytest.mark.parametrize("role", ["fwd", "bwd", "grad"])
def test_a_leaf_that_runs_twice_is_not_refused_and_draws_twice(role: str) -> None:
    """The two calls see one x, and one gradient; their errors are not the same."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.a(x)

    torch.manual_seed(0)
    x = inputs()
    model = lpcompile(Twice(), policy(role), example_inputs=(x,), strict=True)
    assert all(row.runs_as_policy_says for row in report(model).gemms)
    ys = model(x)
    torch.manual_seed(1)
    dy = torch.randn_like(ys[0])
    found = [[y, *torch.autograd.grad(y, (x, model.a.weight), dy)] for y in ys]
    which = ["fwd", "bwd", "grad"].index(role)
    assert share_of_equal(found[0][which], found[1][which]) < 0.05


def _ranks_of_a_loop_of_ones_own(rank: int, world: int) -> Tensor:
    """Under DDP, with gradients as this rank has them before they are reduced."""
    x = inputs()
    model = made(policy())
    wrapped = nn.parallel.DistributedDataParallel(model)
    return gradients(x, wrapped(x))[0]


def test_ranks_draw_their_own_bits_without_being_told_their_rank() -> None:
    first, second = run_ranks(_ranks_of_a_loop_of_ones_own, 2)
    assert share_of_equal(first, second) < 0.05


def test_compiled_code_draws_the_bits_of_eager_code_and_compiles_nothing_anew() -> None:
    """A leaf that runs twice in a checkpoint, two forwards before their backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    results, graphs = [], []
    for is_compiled in (False, True):
        model: Any = made(policy(), times=2, kind="non-reentrant")
        x, step = inputs(), torch.compile(model, backend=counter, fullgraph=True) if is_compiled else model
        found = []
        for _ in range(3):
            ys = [step(x), step(x)]
            found += gradients(x, *ys, keep=False)
            graphs.append(counter.frame_count)
            advance(model)
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert all(share_of_equal(a, b) < 0.05 for a, b in itertools.pairwise(results[1]))
    assert graphs[-1] == graphs[-3] > 0


@pytest.mark.parametrize("door", ["forward", "encode"])
def test_the_mean_over_micro_batches_has_the_error_that_is_due(door: str) -> None:
    """e2m1 over 64 micro-batches: 0.50 where all draw the same bits, a 64th of whose variance is 0.07."""
    x = inputs(128)
    exact = gradients(x, made("fp32")(x))[0]
    model = made(policy())
    one = gradients(x, getattr(model, door)(x))[0]
    mean = torch.stack([gradients(x, getattr(model, door)(x))[0] for _ in range(64)]).mean(0)
    single, due = (float((each - exact).norm() / exact.norm()) for each in (one, mean))
    assert single > 0.2
    assert due == pytest.approx(single / 8, rel=0.15)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("role", ["fwd", "bwd", "grad"])
def test_checkpointing_recomputes_with_the_bits_of_the_first_time(kind: str, role: str, sums: bool) -> None:
    """A leaf that runs three times in the checkpoint, two forwards before any backward, backward in their order."""
    spec, x = policy(role, sums), inputs(8)
    results = []
    for each in ("", kind):
        model = made(spec, times=3, kind=each)
        ys = [model(x), model(x * 2)]
        loss = ys[0].square().sum() + ys[1].abs().sum()
        loss.backward()
        assert x.grad is not None
        results.append([*ys, x.grad, *(p.grad for p in model.parameters())])
        x.grad = None
    assert are_same(*results)


@pytest.mark.parametrize("kinds", [("reentrant", "reentrant"), ("non-reentrant", "non-reentrant"),
                                   ("reentrant", "non-reentrant"), ("non-reentrant", "reentrant")])  # fmt: skip
def test_nested_checkpoints_recompute_with_the_bits_of_the_first_time(kinds: tuple[str, str]) -> None:
    spec, x = policy("fwd"), inputs(8)

    def run(model: Net, use: bool) -> list[Any]:
        def outer(x: Tensor) -> Tensor:
            return model.forward(torch.sin(model.forward(x)))

        model.kind = kinds[1] if use else ""
        y = checkpoint(outer, x, use_reentrant=kinds[0] == "reentrant") if use else outer(x)
        y.square().sum().backward()
        assert x.grad is not None
        found = [y, x.grad.clone(), *(p.grad for p in model.parameters())]
        x.grad = None
        return found

    plain, nested = (run(made(spec, times=2), use) for use in (False, True))
    assert plain[1].abs().sum() > 0
    assert are_same(plain, nested)


def test_a_checkpoint_of_ones_own_is_a_checkpoint() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            ctx.run = run
            ctx.save_for_backward(x)
            return run(x)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None]:
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.run(x)
            torch.autograd.backward(y, dy)
            return None, x.grad

    x, results = inputs(8), []
    for own in (False, True):
        model = made(policy("fwd"), times=2)
        y = Own.apply(model.encode, x) if own else model.encode(x)
        y.square().sum().backward()
        assert x.grad is not None
        results.append([y, x.grad.clone(), *(p.grad for p in model.parameters())])
        x.grad = None
    assert are_same(*results)


def test_a_graph_that_is_kept_recomputes_with_the_same_bits_every_time() -> None:
    model, x = made(policy("fwd"), times=2, kind="non-reentrant"), inputs(8)
    y = model(x)
    first, second = gradients(x, y, y)
    assert torch.equal(first, second)


def test_an_offload_inside_of_a_checkpoint_hides_nothing() -> None:
    x, results = inputs(8), []
    for use in (False, True):
        model = made(policy("fwd"), times=2)

        def run(x: Tensor, model: Net = model) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return model.encode(x)

        y = checkpoint(run, x, use_reentrant=False) if use else run(x)
        y.square().sum().backward()
        assert x.grad is not None
        results.append([x.grad.clone(), *(p.grad for p in model.parameters())])
        x.grad = None
    assert are_same(*results)

"""Interception: products that a module writes as operations run as the policy says, in every call, and nothing else."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from lpcompile import Policy, lpcompile, report
from lpcompile.api import restore, run_state
from lpcompile.errors import LoweringError
from runtime.errors import LoweringWarning
from runtime.numerics import quantize

_OPS = ("matmul", "linear", "conv1d", "conv2d", "conv3d")


def policy_of(*ops: str, name: str = "*", **roles: Any) -> Policy:
    """Both operands of FWD in e4m3, unless `roles` say otherwise."""
    said = roles or {"fwd": {"x": "e4m3", "w": "e4m3"}}
    return Policy.model_validate(
        {"version": 1, "name": "p", "rules": [{"match": {"op": list(ops or _OPS), "name": name}, **said}]}
    )


MATMUL = policy_of("matmul")


class Attention(nn.Module):
    """Softmax attention of one head, by `@`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return (self.q(x) @ self.k(y).mT).softmax(-1) @ y


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _e4m3(x: Tensor) -> Tensor:
    return quantize(x, "e4m3")


def _expected(attention: Attention, x: Tensor, y: Tensor | None = None) -> Tensor:
    """As float64 sums of operands that torch's own e4m3 holds."""
    y = x if y is None else y
    scores = (_e4m3(attention.q(x)).double() @ _e4m3(attention.k(y).mT).double()).float()
    return (_e4m3(scores.softmax(-1)).double() @ _e4m3(y).double()).float()


def _assert_runs(model: nn.Module, calls: int, *sites: str) -> None:
    counts = run_state(model).calls
    for site in sites:
        assert (counts.seen(site, "fwd"), counts.as_said(site, "fwd")) == (calls, calls), site


@pytest.mark.parametrize("with_examples", [True, False])
def test_products_run_in_low_precision_at_any_shape(with_examples: bool) -> None:
    model = Attention()
    lpcompile(model, MATMUL, (_x(2, 5, 8),) if with_examples else None)
    for number, shape in enumerate([(2, 5, 8), (1, 3, 8), (4, 1, 2, 8)], 1):
        x = _x(*shape)
        torch.testing.assert_close(model(x), _expected(restored(model), x), rtol=1e-6, atol=1e-6)
        _assert_runs(model, number, "matmul_0", "matmul_1")
    assert [row.name for row in report(model).gemms if row.role == "fwd"] == ["matmul_0", "matmul_1"]


def restored(model: nn.Module) -> Any:
    """A copy of the model as it was before it was compiled."""
    copied = copy.deepcopy(model)
    restore(copied)
    return copied


def test_gradients_are_those_of_the_cast_operands() -> None:
    cast = {"x": "e4m3", "w": "e4m3"}
    said = {"fwd": cast, "bwd": {"dy": "e5m2", "w": "e4m3"}, "grad": {"dy": "e5m2", "x": "e4m3"}}

    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    a, b = _x(3, 4).requires_grad_(), _x(4, 5).requires_grad_()
    dy = _x(3, 5)
    model = lpcompile(Product(), policy_of("matmul", **said))
    da, db = torch.autograd.grad(model(a, b), (a, b), dy)
    low = quantize(dy, "e5m2").double()
    torch.testing.assert_close(da, (low @ _e4m3(b).double().T).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(db, (_e4m3(a).double().T @ low).float(), rtol=1e-6, atol=1e-6)
    counts = run_state(model).calls
    assert [counts.as_said("matmul_0", role) for role in ("fwd", "bwd", "grad")] == [1, 1, 1]


# What guards missed: each of these ran in full precision, and the certificate said otherwise


class Block(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.norm, self.child, self.attention = nn.LayerNorm(8), child, Attention()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        other = self.child(y)
        return self.attention(y, other[0] if isinstance(other, tuple) else other)


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize("child", [nn.Identity(), nn.Dropout(0.0), nn.Dropout(0.5).eval(), _Pair()])
def test_one_tensor_through_a_child_is_still_attended_to_in_low_precision(child: nn.Module) -> None:
    model, x = Block(child), _x(2, 3, 8)
    lpcompile(model, MATMUL, (x,), strict=True)
    model(x)
    _assert_runs(model, 1, "attention.matmul_0", "attention.matmul_1")


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_is_shared_over_depth(training: bool) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model, x = Shared().train(training), _x(2, 3, 8)
    lpcompile(model, MATMUL, (x,), strict=True)
    model(x)
    _assert_runs(model, 2, "layer.matmul_0", "layer.matmul_1")


def test_a_module_that_assigns_to_requires_grad() -> None:
    class Assigns(Attention):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            x = x.detach()
            x.requires_grad = True
            return super().forward(x, y)

    model, x = Assigns(), _x(2, 3, 8)
    lpcompile(model, MATMUL, (x,), strict=True)
    model(x).sum().backward()
    _assert_runs(model, 1, "matmul_0", "matmul_1")


def test_a_leaf_that_is_replaced_is_counted_no_more() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), _x(2, 8)
    lpcompile(model, policy_of("linear"), (x,))
    model[1] = nn.Linear(8, 8)
    model(x)
    _assert_runs(model, 1, "0")
    assert run_state(model).calls.seen("1", "fwd") == 0


def test_what_a_forward_asks_of_itself_is_read_in_every_call() -> None:
    """Of hasattr, None, isinstance, children and `in self._modules`."""

    class Asks(nn.Module):
        extra: nn.Module | None

        def __init__(self) -> None:
            super().__init__()
            self.a, self.act = nn.Linear(8, 8), nn.ReLU()
            self.extra = None
            self.register_buffer("mask", None)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) * getattr(self, "factor", 1)
            y = y if self.mask is None else y * self.mask
            y = y + 1 if isinstance(self.act, nn.Tanh) else y
            y = y if self.extra is None else self.extra(y)
            y = y + len(list(self.children())) + len([*self.parameters()]) + ("late" in self._modules)
            return y @ y.mT

    original, x = Asks(), _x(3, 8)
    model = lpcompile(copy.deepcopy(original), "fp32-emulated", (x,))
    changes: list[Callable[[Any], object]] = [
        lambda m: setattr(m, "factor", 3),
        lambda m: setattr(m, "mask", torch.ones(8) * 2),
        lambda m: setattr(m, "act", nn.Tanh()),
        lambda m: setattr(m, "extra", nn.Softmax(-1)),
        lambda m: m.add_module("late", nn.Identity()),
        lambda m: setattr(m, "mask", None),
    ]
    for change in changes:
        for each in (original, model):
            change(each)
        assert torch.equal(model(x), original(x))


def test_the_structure_of_a_childs_result_may_change() -> None:
    class Child(nn.Module):
        aux = False

        def forward(self, x: Tensor) -> Any:
            return (x, x * 2) if self.aux else (x, None)

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = Child()

        def forward(self, x: Tensor) -> Any:
            y, aux = self.child(x)
            return {"y": y @ y.mT, "aux": aux, "shape": x.shape}

    model, x = Parent(), _x(3, 8)
    lpcompile(model, MATMUL, (x,))
    assert model(x)["aux"] is None
    model.child.aux = True
    assert torch.equal(model(x)["aux"], x * 2)
    assert type(model(x)["shape"]) is torch.Size


def test_keywords_and_positions_are_one_call() -> None:
    model = Attention()
    lpcompile(model, MATMUL, example_kwargs={"x": _x(2, 3, 8)})
    model(_x(2, 3, 8))
    model(x=_x(2, 3, 8), y=_x(2, 4, 8))
    _assert_runs(model, 2, "matmul_0", "matmul_1")


# Whose product it is


class _OwnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return dy @ b.mT * 7, a.mT @ dy * 7


def test_products_of_an_autograd_function_are_its_own() -> None:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _OwnProduct.apply(x, x.mT) @ x

    original, x = Calls(), _x(3, 3)
    model = lpcompile(Calls(), MATMUL, (x,))
    y = x.clone().requires_grad_()
    inner = _OwnProduct.apply(y, y.mT)
    expected = _e4m3(inner) @ _e4m3(y)
    torch.testing.assert_close(model(x), expected.detach(), rtol=1e-6, atol=1e-6)
    assert [row.name for row in report(model).gemms if row.role == "fwd"] == ["matmul_0"]
    emulated = lpcompile(Calls(), "fp32-emulated", (x,))
    gradients = []
    for each in (original, emulated):
        z = x.clone().requires_grad_()
        each(z).sum().backward()
        gradients.append(z.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_a_model_inside_of_anothers_forward() -> None:
    """Compiled, it has its own policy; not compiled, it is left alone."""
    teacher, compiled = Attention(), lpcompile(Attention(), policy_of("matmul", fwd={"x": "bf16", "w": "bf16"}))

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return (self.own(x) + teacher(x) + compiled(x)) @ x.mT

    x = _x(2, 3, 8)
    model = lpcompile(Student(), MATMUL, (x,))
    before = run_state(compiled).calls.as_said("matmul_0", "fwd")
    expected = _expected(restored(model).own, x) + teacher(x) + compiled(x)
    torch.testing.assert_close(model(x), _e4m3(expected) @ _e4m3(x.mT), rtol=1e-5, atol=1e-5)
    names = {row.name for row in report(model).gemms}
    assert names == {"matmul_0", "own.matmul_0", "own.matmul_1"}
    assert run_state(compiled).calls.as_said("matmul_0", "fwd") == before + 2


def test_leaves_that_no_rule_names_keep_their_products() -> None:
    """Their linear is theirs, and not the first one that the module writes."""
    model, x = Attention(), _x(2, 3, 8)
    lpcompile(model, policy_of("matmul", "linear", name="*_*"), (x,))
    model(x)
    assert {row.name for row in report(model).gemms} == {"matmul_0", "matmul_1"}
    assert {"q", "k"} <= {*report(model).left_alone}


def test_a_computed_layer_that_is_no_leaf() -> None:
    """Circular padding by a subclass that overrides _conv_forward; the same method on an instance; a forward."""

    def circular(self: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w * 2, b)

    class Circular(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return circular(self, input, weight, bias)

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight * 2, self.bias)

    instance = nn.Conv2d(2, 2, 3)
    instance._conv_forward = circular.__get__(instance)  # type: ignore[method-assign]
    for module, x, op in (
        (Circular(2, 2, 3), _x(1, 2, 5, 5), "conv2d_0"),
        (instance, _x(1, 2, 5, 5), "conv2d_0"),
        (Doubled(8, 8), _x(2, 8), "linear_0"),
    ):
        wanted = module(x)
        emulated = lpcompile(nn.Sequential(copy.deepcopy(module)), "fp32-emulated", (x,))
        assert torch.equal(emulated(x), wanted)
        low = lpcompile(nn.Sequential(module), policy_of(), (x,), strict=True)
        found = low(x)
        assert not torch.equal(found, wanted)
        assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99
        _assert_runs(low, 1, f"0.{op}")


# Nothing stays entered


def test_an_error_in_a_forward_leaves_nothing_entered() -> None:
    class Fails(Attention):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            super().forward(x, y)
            if x.shape[0] == 1:
                raise ValueError("one")
            return x

    model = lpcompile(nn.Sequential(Fails()), MATMUL, (_x(2, 3, 8),))
    with pytest.raises(ValueError, match="one"):
        model(_x(1, 3, 8))
    assert not _get_current_function_mode_stack()
    model(_x(2, 3, 8))
    assert not _get_current_function_mode_stack()


def test_two_threads_call_one_model() -> None:
    model = lpcompile(nn.Sequential(*(Attention() for _ in range(3))), MATMUL, (_x(2, 3, 8),))
    inputs = [_x(2, 3 + number, 8) for number in range(2)]
    expected = [model(x) for x in inputs]
    failures: list[str] = []

    def work(number: int) -> None:
        for _ in range(40):
            if not torch.equal(model(inputs[number]), expected[number]):
                failures.append(f"thread {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {row.name.rpartition(".")[2] for row in report(model).gemms} == {"matmul_0", "matmul_1"}


def test_modes_of_others_see_what_they_saw() -> None:
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func is torch.Tensor.softmax
            return func(*args, **(kwargs or {}))

    model, x = lpcompile(Attention(), MATMUL), _x(2, 3, 8)
    with Counting() as counting:
        model(x)
    assert counting.calls == 1
    _assert_runs(model, 1, "matmul_0", "matmul_1")


# Checkpointing, copies


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_runs_the_same_products(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Checkpointed()
    plain = copy.deepcopy(model.layer)
    lpcompile(model, MATMUL, (_x(2, 3, 8).requires_grad_(),))
    lpcompile(plain, MATMUL)
    gradients = []
    for each in (model, plain):
        x = _x(2, 3, 8).requires_grad_()
        each(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in each.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    _assert_runs(model, 2, "layer.matmul_0", "layer.matmul_1")


def test_products_of_a_checkpointed_function_are_left_alone() -> None:
    """It is computed again where no module runs: both times as in the uncompiled model."""

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda t: t @ t.mT, x, use_reentrant=False)  # type: ignore[no-any-return]

    model, x = lpcompile(Inside(), MATMUL), _x(3, 4).requires_grad_()
    y = model(x)
    assert torch.equal(y, x @ x.mT)
    y.sum().backward()


def _through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, _through_torch_save, lambda model: pickle.loads(pickle.dumps(model, 2))]
)
def test_copies_run_on_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    class_of = nn.Sequential(Attention(), Attention())
    model, x = lpcompile(class_of, MATMUL, (_x(2, 3, 8),)), _x(2, 3, 8)
    expected = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), expected)
    _assert_runs(twin, 2, "0.matmul_0", "1.matmul_1")
    _assert_runs(model, 1, "0.matmul_0", "1.matmul_1")


# Policies


def test_a_schedule_changes_what_runs() -> None:
    rules = [{"match": {"op": "matmul"}, "fwd": {"x": "e4m3", "w": "e4m3"}}]
    policy = Policy.model_validate(
        {
            "version": 1,
            "name": "p",
            "rules": rules,
            "schedule": [{"from_step": 0, "policy": {"name": "first", "rules": []}}, {"from_step": 1}],
        }
    )
    from lpcompile import advance

    model, x = lpcompile(Attention(), policy, (_x(2, 3, 8),)), _x(2, 3, 8)
    assert torch.equal(model(x), restored(model)(x))
    advance(model)
    torch.testing.assert_close(model(x), _expected(restored(model), x), rtol=1e-6, atol=1e-6)


def test_strict_raises_at_the_first_call_that_does_not_run_as_said() -> None:
    class Vector(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x[0]

    with pytest.raises(LoweringError, match="vector"):
        lpcompile(Vector(), MATMUL, (_x(3, 4),), strict=True)
    model = lpcompile(Vector(), MATMUL, strict=True)
    with pytest.raises(LoweringError, match=r"matmul_0.*vector"):
        model(_x(3, 4))


def test_a_product_that_falls_through_warns_once() -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    model = lpcompile(Product(), MATMUL, (_x(3, 3), _x(3, 3)))
    numbers = torch.arange(9).view(3, 3)
    with pytest.warns(LoweringWarning, match=r"matmul_0.*torch.int64"):
        assert torch.equal(model(numbers, numbers), numbers @ numbers)
    model(numbers, numbers)
    counts = run_state(model).calls
    assert (counts.seen("matmul_0", "fwd"), counts.as_said("matmul_0", "fwd")) == (2, 0)


# Functions of several products, factors, strides


def _einsums() -> list[str]:
    """Every order of labels in two operands and in the result, with a batch label and without."""
    plain = [
        f"{''.join(a)},{''.join(b)}->{''.join(c)}"
        for a in permutations("ij")
        for b in permutations("jk")
        for c in permutations("ik")
    ]
    batched = [f"bij,{''.join(b)}->{''.join(c)}" for b in permutations("bjk") for c in permutations("bik")]
    return plain + batched


@pytest.mark.parametrize("equation", _einsums())
def test_an_einsum_has_the_values_and_strides_of_torch(equation: str) -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.einsum(equation, a, b)

    sizes = {"b": 2, "i": 3, "j": 4, "k": 5}
    left, right = equation.partition("->")[0].split(",")
    low = [_e4m3(_x(*(sizes[label] for label in labels))).requires_grad_() for labels in (left, right)]
    mine = [x.detach().clone().requires_grad_() for x in low]
    y, wanted = lpcompile(Sum(), MATMUL)(*mine), Sum()(*low)
    dy = torch.ones_like(wanted)
    found = torch.autograd.grad(y, mine, dy)
    for a, b in zip((y, *found), (wanted, *torch.autograd.grad(wanted, low, dy)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert a.stride() == b.stride()


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 2), (0, 0.25), (1, 0.125)])
def test_baddbmm_with_factors(beta: float, alpha: float) -> None:
    class Bloom(nn.Module):
        def forward(self, added: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return added.baddbmm(a, b, beta=beta, alpha=alpha)

    inputs = _x(2, 3, 5), _x(2, 3, 4), _x(2, 4, 5)
    wanted = torch.baddbmm(inputs[0], _e4m3(inputs[1]), _e4m3(inputs[2]), beta=beta, alpha=alpha)
    model = lpcompile(Bloom(), MATMUL, inputs, strict=True)
    torch.testing.assert_close(model(*inputs), wanted, rtol=1e-6, atol=1e-6)
    _assert_runs(model, 1, "baddbmm_0")


@pytest.mark.parametrize("is_apart", [False, True])
def test_multi_head_attention_as_a_function(is_apart: bool) -> None:
    """As WavLM and CLIP call it; equal to the module's own, product by product."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, kdim=8, vdim=8)

        def forward(self, x: Tensor) -> Tensor:
            m = self.inner
            apart = {f"{n}_proj_weight": w for n, w in zip("qkv", m.in_proj_weight.chunk(3))} if is_apart else {}
            return F.multi_head_attention_forward(
                x, x, x, 8, 2, None if is_apart else m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0,
                m.out_proj.weight, m.out_proj.bias, use_separate_proj_weight=is_apart, **apart,
            )[0]  # fmt: skip

    torch.manual_seed(0)
    functional, x = Functional(), _x(5, 2, 8)
    module = copy.deepcopy(functional.inner)
    emulated = lpcompile(copy.deepcopy(functional), "fp32-emulated", (x,), strict=True)
    assert torch.equal(emulated(x), functional(x))
    lpcompile(functional, policy_of(), (x,), strict=True)
    lpcompile(module, policy_of(), strict=True)
    torch.testing.assert_close(functional(x), module(x, x, x)[0], rtol=1e-6, atol=1e-6)
    parts = [f"multi_head_attention_forward_0.{part}" for part in ("qk", "pv", "out_proj")]
    _assert_runs(functional, 1, *parts)


@pytest.mark.parametrize("policy", ["int8", "fp8-rowwise", "hfp8"])
def test_a_model_on_meta_runs_there(policy: str) -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(8, 8), Attention()), torch.empty(2, 3, 8)
    y = lpcompile(model, policy)(x)
    y.sum().backward()
    assert y.is_meta
    assert all(parameter.grad is not None for parameter in model.parameters())


class _Chain(nn.Module):
    """Three operands; the second pair of the other equation is no product of matrices."""

    def __init__(self, equation: str = "bij,bjk,kl->bil") -> None:
        super().__init__()
        self.equation = equation

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.einsum(self.equation, a, b, c)


def _of_chain(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(0)
    operands = [torch.randn(*sizes, requires_grad=True) for sizes in ((2, 3, 4), (2, 4, 5), (5, 6))]
    y = model(*operands)
    return [y, *torch.autograd.grad(y.square().sum(), operands)]


@pytest.mark.parametrize("with_examples", [False, True])
def test_an_einsum_of_three_operands_is_two_products(with_examples: bool) -> None:
    exact, examples = _of_chain(_Chain()), (torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.randn(5, 6))
    cast = {"format": "e4m3", "scale": {"granularity": "tensor"}}
    rules = [{"match": {"name": "einsum_0.1"}, "fwd": {"a": cast, "b": cast}}]
    second = Policy.model_validate({"version": 1, "name": "p", "rules": rules})
    for policy, names in (("fp32-emulated", {"einsum_0.0", "einsum_0.1"}), (second, {"einsum_0.1"})):
        model = lpcompile(_Chain(), policy, examples if with_examples else None, strict=True)
        found = _of_chain(model)
        assert {row.name for row in report(model).gemms} == names
        assert all(row.counts == "1 of 1 calls" for row in report(model).gemms if row.role == "fwd")
        if policy == "fp32-emulated":
            assert all(map(torch.equal, found, exact))
            assert found[0].stride() == exact[0].stride()
    for value, wanted in zip(found, exact):
        assert torch.nn.functional.cosine_similarity(value.flatten(), wanted.flatten(), dim=0) > 0.99
    assert not torch.equal(found[0], exact[0])


def test_a_pair_that_is_no_product_is_counted_as_refused() -> None:
    model = _Chain("bij,bjk,kl->bi")
    exact = _of_chain(model)
    lpcompile(model, "fp32-emulated")
    with pytest.warns(LoweringWarning, match="einsum_0.1 runs as in the uncompiled model"):
        found = _of_chain(model)
    assert all(map(torch.equal, found, exact))
    rows = {row.name: row for row in report(model).gemms if row.role == "fwd"}
    assert (rows["einsum_0.0"].counts, rows["einsum_0.1"].counts) == ("1 of 1 calls", "0 of 1 calls")
    with pytest.raises(LoweringError, match=r"einsum_0\.1"):
        _of_chain(lpcompile(_Chain("bij,bjk,kl->bi"), "fp32-emulated", strict=True))

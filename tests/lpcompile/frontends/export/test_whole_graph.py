"""Whole graphs: a graph casts what the certificate says runs, or the model is not exported."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile import Policy, lpcompile, report

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def policy_of(*ops: str) -> Policy:
    """FWD in e4m3, of these ops or of all."""
    match = {"op": [*ops]} if ops else {"name": "*"}
    rule = {"match": match, "fwd": {"x": "e4m3", "w": "e4m3"}}
    return Policy.model_validate({"version": 1, "name": "p", "rules": [rule]})


class Written(nn.Module):
    """A layer, and a product that the test writes."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.w, self.v = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.write = write

    def forward(self, x: Tensor) -> Any:
        return self.write(self.l(x), self.w, self.v)


def _run(write: Any, policy: Policy, mode: Any, strict: bool = False) -> tuple[Tensor, Any]:
    model = Written(write).eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lpcompile(model, policy, (X,), mode=mode, strict=strict)
        with torch.no_grad():
            return model(X), report(model)


def _not_exported(found: Any) -> list[str]:
    return [each.what for each in found.warnings if each.code == "not-exported"]


@pytest.mark.parametrize(
    ("write", "has_graph"),
    [
        (lambda y, w, v: torch.linalg.matmul(y, w), True),
        (lambda y, w, v: torch.addmm(v, y, w), True),
        (lambda y, w, v: torch.addmm(v, y, w, alpha=2, beta=0.5), False),
        (lambda y, w, v: torch.baddbmm(v, y[None], w[None], alpha=2), False),
        (lambda y, w, v: torch.einsum("ij,jk,kl->il", y, w, w), False),
    ],
)
def test_what_the_certificate_says_runs_is_cast(write: Any, has_graph: bool) -> None:
    policy = policy_of("linear", "matmul")
    (wanted, _), (found, told) = (_run(write, policy, mode, strict=True) for mode in ("train", "infer"))
    assert torch.equal(found, wanted)
    with torch.no_grad():
        assert not torch.equal(found, Written(write)(X))
    assert bool(_not_exported(told)) is not has_graph
    assert all(row.fidelity != "refused" for row in told.gemms)


@pytest.mark.parametrize("ops", [("linear",), ("linear", "matmul"), ()])
@pytest.mark.parametrize(
    "write",
    [
        lambda y, w, v: torch.addmv(y[:, 0], y, v),
        lambda y, w, v: torch.inner(y, w),
        lambda y, w, v: torch.addr(w, y[0], v),
        lambda y, w, v: torch.vdot(y[0], v),
        lambda y, w, v: torch.mm(y, w, out=torch.empty(3, 8)),
        lambda y, w, v: torch.addbmm(w[:3], y[None], w[None]),
        lambda y, w, v: torch.zeros(3, 8).addmm_(y, w),
        lambda y, w, v: y @ torch.matrix_power(w, 3),
        lambda y, w, v: torch.rnn_tanh_cell(y, y, w, w),
    ],
)
def test_products_without_a_form_run_as_without_a_graph(write: Any, ops: tuple[str, ...]) -> None:
    (wanted, before), (found, told) = (_run(write, policy_of(*ops), mode) for mode in ("train", "infer"))
    assert torch.equal(found, wanted)
    assert {(row.name, row.role, row.fidelity) for row in told.gemms} == {
        (row.name, row.role, row.fidelity) for row in before.gemms
    }


def test_a_product_that_only_training_runs_keeps_no_graph_away() -> None:
    class Model(Written):
        def forward(self, x: Tensor) -> Tensor:
            y = self.l(x)
            return y @ self.w @ self.w if self.training else y @ self.w

    model = lpcompile(Model(torch.add).eval(), policy_of("linear", "matmul"), (X,), mode="infer")
    assert not _not_exported(report(model))


def test_threads_compile_their_own_models() -> None:
    models = [Written(lambda y, w, v: y @ w).eval() for _ in range(8)]
    start, faults = threading.Barrier(len(models)), list[BaseException]()

    def compile_one(model: nn.Module) -> None:
        start.wait()
        try:
            lpcompile(model, policy_of("linear", "matmul"), (X,), mode="infer")
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=compile_one, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    with torch.no_grad():
        results = [model(X) for model in models]
    assert all(torch.equal(result, results[0]) for result in results)
    assert not any(_not_exported(report(model)) or report(model).unserved for model in models)

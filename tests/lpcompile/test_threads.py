"""Models that are compiled and run in several threads at a time are what one thread makes of them."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lpcompile import lpcompile, report


class _Net(nn.Module):
    """A layer, a product with a weight and one of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(self.a(x).relu(), self.b.weight)
        z: Tensor = torch.einsum("ij,kj->ik", y, x)
        return z


def _run(model: nn.Module, x: Tensor, has_examples: bool) -> tuple[list[Tensor], list[str]]:
    lpcompile(model, "hfp8", (x,) if has_examples else None)
    y = model(x)
    return [y, *torch.autograd.grad(y.sum(), [*model.parameters()], allow_unused=True)], [
        f"{row.name}.{row.role} {row.backend} {row.calls}" for row in report(model).gemms
    ]


def _make() -> list[_Net]:
    torch.manual_seed(0)
    return [_Net() for _ in range(16)]


def test_models_compiled_in_several_threads_are_those_of_one() -> None:
    x, has = torch.randn(4, 8), [number % 2 == 0 for number in range(16)]
    expected = [_run(model, x, each) for model, each in zip(_make(), has)]
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(_run, _make(), [x] * 16, has)]
    for (values, rows), (wanted, wanted_rows) in zip(found, expected):
        assert rows == wanted_rows
        assert all(a is b or torch.equal(a, b) for a, b in zip(values, wanted))

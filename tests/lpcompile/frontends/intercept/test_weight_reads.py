"""Weights that a module uses itself: the product is reached and counted without example inputs, and the leaf that is
never called is not told to run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile import lpcompile, report
from lpcompile.frontends.intercept.weight_reads import reads_a_matrix_below
from tests.machine_facts import needs_kernels


def _convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return F.conv1d(x, conv.weight, conv.bias, padding=1)


class _Direct(nn.Module):
    """Its convolution is called by its weight, its layer is called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(16, 16, 3), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.conv1d(x, self.conv.weight, self.conv.bias, padding=1).transpose(1, 2))


class _ByHelper(_Direct):
    """In a method, by a function that is given the module."""

    def _mix(self, x: Tensor) -> Tensor:
        return _convolve(self.conv, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self._mix(x).transpose(1, 2))


class _InList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.linear(x, getattr(layer, "weight"), layer.bias)  # noqa: B009
        return x


class _Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weighted, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.weighted(x))


def test_who_reads_a_matrix_below() -> None:
    assert all(map(reads_a_matrix_below, (_Direct(), _ByHelper(), _InList())))
    assert not reads_a_matrix_below(_Called())
    assert not reads_a_matrix_below(nn.Sequential(_Called()))


def _trained(model: nn.Module, policy: str = "hfp8") -> dict[str, tuple[str, int]]:
    """After a step under a policy without example inputs: fidelity and calls of every site's FWD."""
    lpcompile(model, policy)
    model(torch.randn(2, 16, 16)).sum().backward()
    return {row.name: (row.fidelity, row.calls) for row in report(model).gemms if row.role == "fwd"}


def test_products_of_weights_below_are_found_as_they_run() -> None:
    for made, name in ((_Direct, "conv1d_0"), (_ByHelper, "conv1d_0"), (_InList, "linear_1")):
        torch.manual_seed(0)
        rows = _trained(made())
        assert rows[name] == ("format-exact", 1)


def test_a_leaf_that_was_not_called_is_not_told_to_run() -> None:
    model = _Direct()
    assert {row.fidelity for row in report(lpcompile(model, "hfp8")).gemms if row.name == "conv"} == {"format-exact"}
    assert _trained(model)["conv"] == ("not-called", 0)
    told = report(model)
    assert "never called: conv: not called so far" in told.to_text()
    assert len(told.called) == 2 * 3  # out and conv1d_0
    assert told.to_text().startswith(f"policy hfp8 ({told.policy_hash[:12]}): 6 of 6 named GEMMs run so")


@needs_kernels
def test_compiled_code_counts_none_so_nothing_is_told_of_its_leaves() -> None:
    model = lpcompile(_Called(), "hfp8")
    torch.compile(model, backend="aot_eager")(torch.randn(2, 16, 16))
    assert {row.fidelity for row in report(model).gemms} == {"bounded"}

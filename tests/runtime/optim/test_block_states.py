"""Moments in blocks: an independent reference in Python's floats, constants of the papers, resume, shards, refusals."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from runtime.errors import LpError, NotSupported
from runtime.optim.adamw import LowPrecisionAdamW
from runtime.optim.block_names import block_state_of
from runtime.optim.block_states import Layout, decoded, encoded, expansion, table_of
from runtime.optim.formats import UpdateFormats
from runtime.optim.places import Run
from runtime.optim.power import power
from runtime.optim.rounding import Draw, rounded
from runtime.optim.sgd import LowPrecisionSGD
from tests.multiprocess import run_ranks

NAMES = ["e4m3/128", "e5m2/64", "e4m3/128/expand", "dynamic8/256", "dynamic4/128"]


def _nearest(values: Tensor, format: str) -> Tensor:
    return rounded(values, format, "nearest_even", Draw(0, 0, 0, [Run(0, values.numel(), 0)]))


def _kept(values: Tensor, name: str, is_signed: bool) -> tuple[list[Tensor], Tensor]:
    state = block_state_of(name)
    assert state is not None
    layout = Layout([Run(0, values.numel(), 0)], values.numel(), state.block)
    found = encoded(values, state, layout, is_signed, _nearest)
    return found, decoded(found, state, layout, is_signed)


def _float8(value: float, format: str) -> float:
    kind = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[format]
    return float(np.float32(value).astype(kind))


def _reference(values: list[float], name: str, is_signed: bool) -> list[float]:
    """What comes back, by the equations of the papers, value by value."""
    element, size, *rest = name.split("/")
    result = []
    for begin in range(0, len(values), int(size)):
        block = values[begin : begin + int(size)]
        most = max(map(abs, block))
        if element.startswith("dynamic"):
            table = table_of(element, is_signed).tolist()
            scale = most or 1.0
            result += [min(table, key=lambda each, x=x: abs(x / scale - each)) * scale for x in block]  # type: ignore[misc]
            continue
        top = {"e4m3": 448.0, "e5m2": 57344.0}[element]
        if not rest:
            scale = float(np.float32(most) / np.float32(top)) or 1.0
            result += [_float8(float(np.float32(x) / np.float32(scale)), element) * scale for x in block]
            continue
        least = min(abs(x) for x in block if x)
        center = math.sqrt(most * least)
        k = math.floor(math.log2(top**2 / 2) / math.log2(most / least) * 16) / 16
        scale = (most / center) ** k / top
        for x in block:
            q = _float8((abs(x) / center) ** k / scale, element)
            result.append(math.copysign((q * scale) ** (1 / k) * center, x))
    return result


def _moments(is_signed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1000, generator=generator) * 10.0 ** (6 * torch.rand(1000, generator=generator) - 8)
    values[40:50] = 0
    return values if is_signed else values.square()


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_equations(name: str, is_signed: bool) -> None:
    values = _moments(is_signed)
    if name == "dynamic4/128" and not is_signed:
        assert bool((_kept(values, name, is_signed)[1][:128] > 0).all()), "the second moment has no 0"
    _, ours = _kept(values, name, is_signed)
    theirs = torch.tensor(_reference(values.tolist(), name, is_signed), dtype=torch.float64)
    off = ((ours.double() - theirs).abs() / theirs.abs().clamp(min=1e-30)) > 2e-6
    assert int(off.sum()) <= 2, "a value at a tie may be an ulp of the format away, all others are equal"


def test_a11_of_coat() -> None:
    most, least = torch.tensor([1e-2, 1.0, 3.0]), torch.tensor([1e-4, 0.1, 3.0])
    scale, center, steps = expansion(torch.stack((most, least)), "e4m3")
    assert (steps.double() / 16).tolist() == [2.5, 5.0, 15.0]
    assert center.tolist() == pytest.approx([1e-3, math.sqrt(0.1), 3.0])
    k = torch.tensor([2.5, 5.0], dtype=torch.float64)
    grown = [power(each[:2].double() / center[:2].double(), k).tolist() for each in (most, least)]
    assert grown[0] == pytest.approx([316.2278, 316.2278], rel=1e-5)
    assert grown[1] == pytest.approx([3.1623e-3, 3.1623e-3], rel=1e-4)
    assert (scale[:2] * 448).tolist() == pytest.approx([316.2278, 316.2278], rel=1e-5)


def test_tables_of_dettmers() -> None:
    signed, unsigned = table_of("dynamic8", True), table_of("dynamic8", False)
    for table in (signed, unsigned, table_of("dynamic4", True), table_of("dynamic4", False)):
        assert len(table) in (16, 256)
        assert bool((table.diff() > 0).all())
        assert table[-1] == 1
    assert float(signed[0]) == pytest.approx(-0.99296875)
    assert float(signed[signed > 0].min()) == pytest.approx(0.55e-6)
    assert float(unsigned[1]) == pytest.approx(0.325e-6)
    expected = [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0, 0.0055, 0.0325, 0.0775, 0.2125]
    assert table_of("dynamic4", True).tolist() == pytest.approx([*expected, 0.4375, 0.6625, 0.8875, 1.0])
    assert table_of("dynamic4", False).tolist() == [each / 16 for each in range(1, 17)]


def test_power_is_that_of_an_element_wherever_it_lies() -> None:
    x = torch.rand(1003, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-4
    p = torch.full_like(x, 3.0625)
    assert torch.allclose(power(x, p), x**p, rtol=1e-13, atol=0)
    assert all(torch.equal(power(x[i : i + 1], p[:1]), power(x, p)[i : i + 1]) for i in range(995, 1003))
    assert power(torch.zeros(1, dtype=torch.float64), p[:1]).item() == 0


@pytest.mark.parametrize("name", ["e4m3/4", "e4m3/4/expand", "dynamic8/4", "dynamic4/4"])
def test_zeros_nan_and_inf(name: str) -> None:
    values = torch.zeros(12)
    values[4:8] = torch.tensor([1.0, math.nan, -2.0, 0.0])
    values[8:] = torch.tensor([1.0, math.inf, -2.0, 0.25])
    back = _kept(values, name, True)[1]
    assert back[:4].tolist() == [0, 0, 0, 0]
    assert back[5].isnan()
    if name.startswith("dynamic"):
        assert bool(back[4:].isnan().all()), "a table has neither: the block says so"
    else:
        assert back[[4, 6, 7]].tolist() == pytest.approx([1, -2, 0], rel=0.1)
        assert back[8:].tolist() == pytest.approx([1, 2, -2, 0.25], rel=0.1), "Inf saturates"


def _steps(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, place: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for weight in weights:
            sizes = 10.0 ** (4 * torch.rand(weight.shape, generator=generator) - 6)
            weight.grad = place(torch.randn(weight.shape, generator=generator) * sizes)
        optimizer.step()


def _weights(place: Callable[[Tensor], Tensor]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(place(torch.randn(shape, generator=generator))) for shape in ((33, 13), (7,), (5, 128))]


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_exact_and_bytes_are_those_allocated(name: str) -> None:
    formats = UpdateFormats("fp32", name, name)
    weights = _weights(torch.clone)
    optimizer = LowPrecisionAdamW(weights, formats=formats)
    _steps(weights, optimizer, torch.clone)
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = LowPrecisionAdamW(copies, formats=formats)
    resumed.load_state_dict(optimizer.state_dict())
    held = sum(
        value.nbytes for weight in weights for key, value in optimizer.state[weight].items() if key != "step"
    ) + sum(weight.nbytes for weight in weights)
    assert optimizer.bytes_per_parameter() == held / sum(weight.numel() for weight in weights)
    _steps(weights, optimizer, torch.clone)
    _steps(copies, resumed, torch.clone)
    assert all(map(torch.equal, weights, copies))


def test_a_state_of_another_kind_is_refused() -> None:
    weights = _weights(torch.clone)
    optimizer = LowPrecisionAdamW(weights, formats=UpdateFormats("fp32", "e4m3/128", "e4m3/128"))
    _steps(weights, optimizer, torch.clone)
    other = LowPrecisionAdamW(weights, formats=UpdateFormats("fp32", "e4m3/64", "e4m3/128"))
    with pytest.raises(LpError, match="kept under another `momentum_format`"):
        other.load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    state["state"][0]["exp_avg_scale"] = state["state"][0]["exp_avg_scale"].double()
    with pytest.raises(LpError, match="the state `exp_avg_scale` does not fit"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("name", ["e4m3/127", "e4m3/1", "bf16/128", "dynamic8/256/expand", "e4m3/128/grow", "e4m3/"])
def test_refuses_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(NotSupported, match="no state with blocks"):
        UpdateFormats("fp32", name, "fp32")


def test_refuses_what_has_no_blocks() -> None:
    with pytest.raises(NotSupported, match="SGD keeps no momentum in blocks"):
        LowPrecisionSGD(_weights(torch.clone), formats=UpdateFormats("fp32", "e4m3/128"))
    optimizer = LowPrecisionAdamW(_weights(torch.clone), formats=UpdateFormats("fp32", "e4m3/128"))
    with pytest.raises(NotSupported, match="where those end in a flat group is not known"):
        optimizer.begin_at([0])


CASES = {name: UpdateFormats("fp32", name, name, "stochastic") for name in NAMES[:4]}


def _train(formats: UpdateFormats, place: Callable[[Tensor], Tensor]) -> list[list[float]]:
    weights = _weights(place)
    optimizer = LowPrecisionAdamW(weights, lr=0.01, formats=formats, seed=9)
    _steps(weights, optimizer, place)
    kept = [value for weight in weights for value in optimizer.state[weight].values()]
    whole = (each.full_tensor() if isinstance(each, DTensor) else each for each in (*weights, *kept))
    return [each.detach().double().flatten().tolist() for each in whole]


def _shards(rank: int, world: int) -> dict[tuple[str, int], Any]:
    mesh = init_device_mesh("cpu", (world,))

    def placed(value: Tensor, dim: int) -> Tensor:
        return distribute_tensor(value, mesh, [Shard(min(dim, value.dim() - 1))])

    found: dict[tuple[str, int], Any] = {}
    for name, dim in ((name, dim) for name in CASES for dim in (0, 1)):
        found[name, dim] = _train(CASES[name], partial(placed, dim=dim))
    with pytest.raises(NotSupported, match="not cut over ranks"):
        _train(UpdateFormats("fp32", "dynamic4/128"), partial(placed, dim=0))
    return found


def test_shards_have_the_blocks_and_bits_of_the_whole() -> None:
    whole = {name: _train(CASES[name], torch.clone) for name in CASES}
    for results in run_ranks(_shards, 2):
        for (name, dim), ours in results.items():
            assert ours == whole[name], (name, dim)

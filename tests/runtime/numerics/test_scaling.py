"""Scaling: every granularity against a loop over its groups, the rules at their edges, the kernel against torch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import FormatError
from runtime.kernels.cast import scales
from runtime.kernels.cast.scales import compute_scale
from runtime.numerics.casts import to_grid
from runtime.numerics.formats import get_format
from runtime.numerics.scaling import expand_scale
from runtime.numerics.specs import MAX_SIZE, QuantSpec

GRANULARITIES = ["tensor", "row", "column", "block[2,3]", "block[1,128]", "block[128,128]", "block[64,1]"]
SHAPES = [(5, 7), (2, 3, 9), (11,), (1, 1), (130, 257)]


def spec_of(granularity: str, rule: str = "amax", format: str = "e4m3") -> QuantSpec:
    return QuantSpec.parse(f"{format} nearest_even {granularity}/{rule}")


@pytest.mark.parametrize("use_kernel", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_element_is_divided_by_the_scale_of_its_group(
    granularity: str, shape: tuple[int, ...], use_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not use_kernel:
        _without_kernel(monkeypatch)
    spec = spec_of(granularity)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scale = compute_scale(x, spec)
    assert scale is not None
    assert spec.scale is not None
    expected_shapes = {"tensor": (), "row": (*shape[:-1], 1), "column": (1,) * (len(shape) - 1) + shape[-1:]}
    m, k = math.prod(shape[:-1]), shape[-1]
    b0, b1 = {"tensor": (m, k), "row": (1, k), "column": (m, 1)}.get(granularity, spec.scale.block)
    assert tuple(scale.shape) == expected_shapes.get(granularity, (-(-m // b0), -(-k // b1)))
    assert scale.dtype == torch.float32
    flat = x.reshape(m, k).numpy()
    expected = np.empty((m, k), np.float32)
    for i in range(0, m, b0):
        for j in range(0, k, b1):
            expected[i : i + b0, j : j + b1] = np.abs(flat[i : i + b0, j : j + b1]).max() / np.float32(448)
    assert np.array_equal(expand_scale(scale, x.shape, spec).broadcast_to(shape).reshape(m, k).numpy(), expected)


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-80, 2.0**120, width=32), st.sampled_from(["e4m3", "e5m2", "int8", "int4", "dlfloat16"]))
def test_the_rules_against_exact_arithmetic(amax: float, format: str) -> None:
    x, largest = torch.tensor([amax, -amax / 3]), get_format(format).max
    linear = compute_scale(x, spec_of("tensor", "amax", format))
    power = compute_scale(x, spec_of("tensor", "pow2", format))
    assert linear is not None
    assert power is not None
    assert linear.item() == float(np.float32(amax) / np.float32(largest))
    mantissa, _ = math.frexp(power.item())
    assert mantissa == 0.5
    assert Fraction(power.item()) * Fraction(largest) >= Fraction(amax) > Fraction(power.item() / 2) * Fraction(largest)


@pytest.mark.parametrize("rule", ["amax", "pow2"])
@pytest.mark.parametrize("use_kernel", [True, False])
def test_edges(rule: str, use_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not use_kernel:
        _without_kernel(monkeypatch)
    spec = spec_of("row", rule)
    rows = [
        [0.0, -0.0],
        [math.nan, 1.0],
        [math.inf, 1.0],
        [1.0, -math.inf],
        [1e-45, 0.0],
        [448.0, 1.0],
        [-896.0, math.nan],
    ]
    scale = compute_scale(torch.tensor(rows), spec)
    assert scale is not None
    assert scale.flatten().tolist() == [1, 1, 1, 1, 2.0**-126, 1, 1]
    huge = compute_scale(torch.tensor([3.0e38]), QuantSpec.parse(f"1-4-3:bias=120 nearest_even tensor/{rule}"))
    assert huge is not None
    assert huge.item() == (2.0**127 if rule == "pow2" else torch.finfo(torch.float32).max)


@pytest.mark.parametrize("rule", ["amax", "pow2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_and_torch_find_equal_scales(dtype: torch.dtype, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    cases = []
    for shape in ((300, 200), (7, 1), (1, 9), (2, 65, 33), (40000,)):
        x = torch.randn(shape, generator=generator).to(dtype)
        spoiled = x.clone()
        spoiled.view(-1)[::11] = math.inf
        spoiled.view(-1)[::37] = math.nan
        tiny = x * 1e-6  # fp16: subnormals
        cases += [
            (one, spec_of(g, rule, "e5m2")) for one in (x, spoiled, tiny) for g in (*GRANULARITIES, "block[3,16]")
        ]
    fast = [compute_scale(x, spec) for x, spec in cases]
    _without_kernel(monkeypatch)
    for (x, spec), scale in zip(cases, fast):
        slow = compute_scale(x, spec)
        assert scale is not None
        assert slow is not None
        assert scale.shape == slow.shape
        assert torch.equal(scale, slow)


def test_no_scale_no_elements_no_dims_and_no_integers() -> None:
    assert compute_scale(torch.ones(3), QuantSpec("e4m3")) is None
    for granularity, shape in (("tensor", ()), ("row", (0, 1)), ("column", (1, 4)), ("block[2,2]", (0, 2))):
        scale = compute_scale(torch.empty(0, 4), spec_of(granularity))
        assert scale is not None
        assert tuple(scale.shape) == shape
    for granularity in ("tensor", "row", "column", "block[2,2]"):
        scale = compute_scale(torch.tensor(-896.0), spec_of(granularity))
        assert scale is not None
        assert expand_scale(scale, torch.Size(()), spec_of(granularity)).item() == 2
    with pytest.raises(FormatError, match="real numbers"):
        compute_scale(torch.ones(3, dtype=torch.int32), spec_of("tensor"))


def _without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "fast_scale", lambda *_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_beyond_the_matrix_is_the_matrix(dtype: torch.dtype) -> None:
    """And takes no memory of its size."""
    x = torch.randn(3, 4, 32, dtype=dtype)
    for block, like in ((f"[1,{MAX_SIZE}]", "row"), (f"[{MAX_SIZE},{MAX_SIZE}]", "tensor")):
        spec, other = (QuantSpec.parse(f"e4m3 nearest_even {each}/amax") for each in (f"block{block}", like))
        scale, wanted = compute_scale(x, spec), compute_scale(x, other)
        assert torch.equal(scale.flatten(), wanted.flatten())
        assert torch.equal(to_grid(x, spec, scale), to_grid(x, other, wanted))
    with pytest.raises(FormatError, match=r"not a block of a scale\. Expected 1 to 2147483647 each"):
        QuantSpec.parse(f"e4m3 nearest_even block[1,{MAX_SIZE + 1}]/amax")

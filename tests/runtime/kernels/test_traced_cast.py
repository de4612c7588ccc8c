"""Traced casts: the oracle's bits before and after a compiler has fused them, in one kernel with their neighbours."""

import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

from runtime.errors import FormatError
from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cast.traced import Draw, traced_to_grid
from runtime.numerics import decode, encode, quantize
from runtime.numerics.casts import to_grid
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from runtime.numerics.scaling import compute_scale
from runtime.numerics.specs import ROUNDINGS, QuantSpec, Rounding, ScaleSpec
from tests.machine_facts import HAS_COMPILER, needs_compiler
from tests.runtime.kernels.test_cast import DECLINED, NAMES, hard_values

DRAW = Draw(seed=2**40 + 5, step=2, stream=(7 << 33) + 7, offset=13)
DETERMINISTIC: list[tuple[str, Rounding]] = [
    ("e4m3", "nearest_even"),
    ("dlfloat16", "nearest_away"),
    ("fp16", "toward_zero"),
    ("e5m2", "nearest_even"),
    ("hfp8-143", "nearest_even"),
    ("fp4-radix4", "nearest_even"),
    ("int8", "nearest_even"),
    ("nf4", "nearest_even"),
    ("bf16", "nearest_even"),
    ("tf32", "nearest_even"),
    ("fp16", "nearest_even"),
]


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {torch.float32: torch.int32}.get(a.dtype, torch.int16)
    assert a.dtype == b.dtype
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DECLINED])
def test_equals_the_oracle_in_every_mode_and_dtype(name: str) -> None:
    one = torch.tensor(1.0)
    for mode, dtype in itertools.product(ROUNDINGS, (torch.float32, torch.bfloat16, torch.float16)):
        if mode == "stochastic" or (mode == "toward_zero" and name == "int1"):
            continue
        x = hard_values(name).to(dtype)
        expected = to_grid(x, QuantSpec(name, mode, ScaleSpec()), one, **DRAW._asdict())
        assert same_bits(traced_to_grid(x, name, mode, one), expected), (mode, dtype)


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    if not HAS_COMPILER:
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    metrics.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def test_compiled_code_has_the_bits_of_eager_code() -> None:
    """Every bf16 and fp16, and a million patterns of fp32: subnormals, NaN, Inf and -0 among them."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    generator = torch.Generator().manual_seed(4)
    patterns = torch.randint(-(2**31), 2**31, (10**6,), generator=generator).to(torch.int32).view(torch.float32)
    inputs = [halves.view(torch.bfloat16), halves.view(torch.float16), patterns]

    def casts(xs: list[Tensor]) -> list[Tensor]:
        return [quantize(x, name, mode) for x in xs for name, mode in DETERMINISTIC]

    for got, expected in zip(_compiled(casts)(inputs), casts(inputs)):  # type: ignore[call-overload]
        assert same_bits(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e4m3", "e5m2", "hfp8-143", "1-6-9", "e3m2", "e2m1", "bf16", "tf32"])
def test_rounding_by_sums_holds_for_every_mantissa(name: str) -> None:
    """All fp32 values of every binade from below the smallest subnormal to above the largest value of the format."""
    row = get_format(name)
    assert isinstance(row, FloatFormat)
    mantissas = torch.arange(2**23, dtype=torch.int32)
    first, last = math.floor(math.log2(row.tiny)) - row.mantissa - 2, math.floor(math.log2(row.max)) + 1
    for exponent in range(first, last + 1):
        x = ((exponent + 127 << 23) + mantissas).view(torch.float32)
        assert same_bits(traced_to_grid(-x, name, None, None), fast_to_grid(-x, QuantSpec(name), None))


def test_compiled_stochastic_rounding_draws_the_bits_of_eager_code() -> None:
    x = hard_values("e5m2")[:4003]

    def cast(x: Tensor) -> Tensor:
        return quantize(x, "e5m2", "stochastic", 0.7, **DRAW._asdict())

    assert same_bits(_compiled(cast)(x), cast(x))  # type: ignore[arg-type]


@needs_compiler
def test_a_cast_is_one_kernel_with_its_neighbours() -> None:
    def around(x: Tensor) -> Tensor:
        return quantize(x * 2, "e4m3", scale=x.abs().amax() / 448) + 1

    x = torch.randn(64, 100)
    assert torch.equal(_compiled(around)(x), around(x))  # type: ignore[arg-type]
    assert metrics.generated_kernel_count == 2  # the maximum, and the rest

    def alone(x: Tensor) -> Tensor:
        return quantize(x * 2, "1-6-9") + 1

    assert torch.equal(_compiled(alone)(x), alone(x))  # type: ignore[arg-type]
    assert metrics.generated_kernel_count == 1


def _num_kernels(function: Callable[..., object], *given: Tensor) -> int:
    """C++ kernels of the one graph that Inductor makes."""
    torch._dynamo.reset()
    _, codes = run_and_get_code(torch.compile(function, fullgraph=True), *given)
    return len(re.findall(r"^cpp_fused\w* = async_compile", codes[0], re.MULTILINE))


@needs_compiler
@pytest.mark.parametrize("spec", ["e4m3", "e4m3 nearest_even row/amax", "int8 nearest_even tensor/amax"])
def test_a_norm_and_the_cast_of_its_result_are_one_kernel(spec: str) -> None:
    """Statistics, norm, amax and rounding: x is read from memory, the grid written to it, and nothing between."""
    parsed = QuantSpec.parse(spec)

    def cast(y: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = compute_scale(y, parsed)
        return fast_to_grid(y, parsed, scale), scale

    def rms_norm(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        return cast(w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))

    def layer_norm(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        return cast(F.layer_norm(x, w.shape, w, w))

    with torch.no_grad():
        for function in (rms_norm, layer_norm):
            assert _num_kernels(function, torch.randn(64, 256), torch.randn(256)) == 1


@pytest.mark.parametrize("format", ["mxfp8", "mxfp4:scale=even", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_format_is_an_op_of_compiled_code(format: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 96).to(dtype)

    def cast(x: Tensor) -> Tensor:
        return quantize(x, format) + quantize(x, format, "stochastic", **DRAW._asdict())

    assert torch.equal(_compiled(cast)(x), cast(x))  # type: ignore[arg-type]
    given = (format, "stochastic", 3, 2, 1, 0)
    torch.library.opcheck(torch.ops.lp.quantize_block_values.default, (x.requires_grad_(), *given))


def test_a_block_format_gives_a_straight_through_gradient_as_an_op() -> None:
    x = torch.randn(4, 32, requires_grad=True)
    torch.ops.lp.quantize_block_values(x, "mxfp8", None, 0, 0, 0, 0).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * quantize(x, "mxfp8"))


@pytest.mark.slow
def test_compiled_stochastic_rounding_takes_new_keys_without_compiling_anew() -> None:
    x = hard_values("e4m3")[:1001]

    def cast(x: Tensor, seed: int, step: int, stream: int) -> Tensor:
        return quantize(x, "e4m3", "stochastic", seed=seed, step=step, stream=stream)

    compiled = _compiled(cast)
    for key in ((3, 1, 0), (4, 2, 5), (-7, 3, 2**40 + 3), (2**40 + 1, 2**31, 6)):
        assert same_bits(compiled(x, *key), cast(x, *key))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: quantize(x, "e4m3", overflow="ieee"),
        lambda x: quantize(x, "e5m2", scale=0.5, overflow="ieee"),
        lambda x: quantize(x.double(), "e4m3", scale=0.7).float(),
        lambda x: quantize(x.double(), "nf4").float(),
        lambda x: quantize(x, "1-8-3:bias=128,top=nan"),
        lambda x: encode(x, "e4m3").float(),
        lambda x: decode(encode(x, "1-6-9", scale=0.5), "1-6-9"),
    ],
    ids=["ieee", "ieee scaled", "fp64", "fp64 table", "no plan", "encode", "decode"],
)
def test_what_is_not_fused_is_an_op_of_compiled_code(cast: Callable[[Tensor], Tensor]) -> None:
    x = hard_values("e4m3")[:512]
    assert same_bits(_compiled(cast)(x), cast(x))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {"rounding": "nearest"}, {"rounding": ""}, {"scale": -1.0}, {"scale": 1e-50},
        {"rounding": "stochastic", "step": -1}, {"rounding": "stochastic", "step": 2**32},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_are_refused_in_compiled_code_too(bad: dict[str, object]) -> None:
    torch._dynamo.reset()
    with pytest.raises(FormatError):
        torch.compile(lambda x: quantize(x, "e4m3", **bad))(torch.ones(3))

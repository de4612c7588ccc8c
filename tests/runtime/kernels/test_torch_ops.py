"""The table of torch ops: every row has sample calls here, which torch.library.opcheck takes apart."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lpcompile
from runtime.kernels.cast import block_codes, public
from runtime.kernels.torch_ops import OPS
from runtime.numerics.specs import QuantSpec
from runtime.ops import matrix_product, site_products, traced
from runtime.ops.plan import plan_text
from runtime.quantize.learned import lsq
from runtime.quantize.observed.delayed import Delayed
from runtime.state import RunState

X = torch.linspace(-3.0, 4.0, 4 * 8 * 16).view(4, 8, 16)
W = torch.linspace(-2.0, 1.0, 24 * 16).view(24, 16)
DY = torch.linspace(-1.0, 1.0, 4 * 8 * 24).view(4, 8, 24)
IMAGE = torch.linspace(-3.0, 4.0, 2 * 3 * 5 * 5).view(2, 3, 5, 5)
FILTER = torch.linspace(-3.0, 4.0, 4 * 3 * 3 * 3).view(4, 3, 3, 3)
LAST = torch.channels_last
CONV = "stride=1,1 padding=1,1 dilation=1,1 groups=1"
E4M3 = "e4m3 nearest_even"


def _layer(cast: str, sums: str = "fp32", out: str = "fp32") -> str:
    return "; ".join(f"{role}: {cast} * {cast} -> {sums} -> {out}" for role in ("fwd", "bwd", "grad"))


def _plan(kind: str, cast: str, method: str, sums: str = "fp32", out: str = "fp32", geometry: str = "") -> Any:
    plan = plan_text(kind, _layer(cast, sums, out), ",".join([method] * 3), 0, geometry)
    return plan, (0, 0, 0, 0), torch.float32


DELAYED = "e4m3 nearest_even delayed"
OBSERVING = RunState()
OBSERVING.quantizers["layer.x"] = Delayed(QuantSpec.parse(DELAYED), "layer.x", is_weight=False)
DRAW = (7, 1, 2, 3)
ROWS = torch.rand(4, 8, 1)
PLAIN, EMULATED = _plan("linear", E4M3, "fp32"), _plan("linear", E4M3, "sequential", "1-6-9 stochastic")
INT8 = _plan("linear", "int8 nearest_even row/amax", "int8", "int32")
NARROW = _plan("linear", E4M3, "fp32", out="bf16")
CONVOLVED = _plan("conv", E4M3, "fp32", geometry=CONV)
INTS = (X * 10).round().to(torch.int8)
SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "compute_scale": [
        *((X.to(dtype), f"{E4M3} {scale}/amax") for scale in ("tensor", "row", "column", "block[3,5]")
          for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        (X, "int8 nearest_even row/pow2"), (X.transpose(0, 1), f"{E4M3} row/amax"), (X, "nvfp4 nearest_even row"),
        (FILTER, f"{E4M3} channel/amax"), (torch.empty(0, 4), f"{E4M3} row/amax"),
    ],
    "to_grid": [
        (X, ROWS, f"{E4M3} row/amax", torch.bfloat16, *DRAW), (X.transpose(0, 2), None, E4M3, torch.float32, *DRAW),
        (X.double(), None, "e4m3 stochastic", torch.float32, *DRAW),
        (X, None, "nf4 nearest_even", torch.float32, *DRAW), (X.double(), None, "nvfp4", torch.float32, *DRAW),
        (X, None, "mxfp8 nearest_even column", torch.float32, *DRAW), (X, None, "fp32", torch.float32, *DRAW),
        (X.half(), None, "int8 nearest_even", torch.int8, *DRAW), (X, None, "dlfloat16", torch.float32, *DRAW),
    ],
    "to_grid_checked": [
        (X, None, "int8 nearest_even", torch.int8, *DRAW),
        (X * torch.nan, None, "int8 nearest_even", torch.int8, *DRAW),
        (X, None, "nvfp4 stochastic batched-column", torch.bfloat16, *DRAW),
        (X.double(), None, E4M3, torch.float32, *DRAW),
    ],
    "cast_gradient": [
        (X, f"{E4M3} row/amax", (0, 0, 0, 0), -1, 0, 4, "layer.dy"),
        (X, "int8 stochastic tensor/amax", (1, 2, 3, 4), -1, 0, 4, "layer.dy"),
        (X, "mxfp8 nearest_even row", (0, 0, 0, 0), -1, 0, 4, "layer.dy"),
        (X, "fp32", (0, 0, 0, 0), -1, 0, 4, "layer.dy"),
    ],
    "to_grid_observed": [
        (X, torch.tensor(0.5), DELAYED, torch.float32, *DRAW[:3]),
        (X.bfloat16(), torch.tensor(2.0), DELAYED, torch.bfloat16, *DRAW[:3]),
    ],
    "cast_observed": [(X, DELAYED, (0, 0, 0, 0), OBSERVING.key, 0, 0, "layer.x", looks) for looks in (True, False)],
    "cast": [
        (X, f"{E4M3} row/amax", (0, 0, 0, 0), 0, 1), (X, "e4m3 stochastic", (1, 2, 3, 4), 5, 0),
        (X, "mxfp8 nearest_even row", (0, 0, 0, 0), 0, 0),
    ],
    "site_fwd": [
        (X, W, W[:, 0], PLAIN[0], True, "layer", (0, 0, 0, 0), -1, False, torch.float32),
        (X, X.transpose(1, 2), None, _plan("matmul", f"{E4M3} tensor/amax", "fp32")[0], False, "qk",
         (0, 0, 0, 0), -1, False, torch.float32),
        (X, W, None, _plan("linear", "fp32", "as_is")[0], True, "layer", (0, 0, 0, 0), -1, False, torch.float32),
        (IMAGE, FILTER, FILTER[:, 0, 0, 0], CONVOLVED[0], True, "conv", (0, 0, 0, 0), -1, False, torch.float32),
    ],
    "site_bwd": [(DY, W, X.shape, PLAIN[0], True, "layer", (0, 0, 0, 0), -1, False, torch.float32)],
    "site_grad": [(DY, X, W.shape, PLAIN[0], True, "layer", (0, 0, 0, 0), -1, False, torch.float32)],
    "fwd": [
        (X, None, W, None, None, *PLAIN), (X, ROWS, W, None, W[:, 0], *PLAIN, DY, "relu"),
        (X.bfloat16(), None, W, None, None, *NARROW[:-1], torch.bfloat16, None, "gelu"),
        (X, None, W, None, W[:, 0], *EMULATED), (INTS, ROWS, W.to(torch.int8), None, None, *INT8),
        (INTS.bfloat16(), ROWS, W.to(torch.int8), None, None, *INT8),
        (X, None, W.t().contiguous(), None, None, *_plan("linear_kn", E4M3, "fp32")),
        (X, None, X.transpose(1, 2), None, None, *_plan("matmul", E4M3, "fp32")),
        (IMAGE, None, FILTER, None, FILTER[:, 0, 0, 0], *CONVOLVED, None, "gelu-tanh"),
        (IMAGE.contiguous(memory_format=LAST), None, FILTER, torch.tensor(2.0), None, *CONVOLVED),
        (IMAGE, None, FILTER, None, None, *_plan("conv", E4M3, "sequential", "1-6-9", geometry=CONV)),
    ],
    "bwd": [
        (DY, None, W, None, X.shape, *PLAIN), (DY, None, W, None, X.shape, *EMULATED),
        (DY.transpose(0, 1).contiguous().transpose(0, 1), None, W, None, X.shape, *PLAIN),
        (IMAGE.new_ones(2, 4, 5, 5).contiguous(memory_format=LAST), None, FILTER, None, IMAGE.shape, *CONVOLVED),
    ],
    "grad": [
        (DY, None, X, None, W.shape, *PLAIN), (DY, None, X, None, W.shape, *EMULATED),
        (IMAGE.new_ones(2, 4, 5, 5), None, IMAGE, None, FILTER.shape, *CONVOLVED),
    ],
    "matrix_product": [
        (X, X.transpose(1, 2), f"{E4M3} * {E4M3} -> 1-6-9/4 -> fp32", 0, 0),
        (X, X.transpose(1, 2), f"{E4M3} * {E4M3} -> fp32/8 toward_zero aligned[24] -> fp32", 0, 0),
    ],
    "quantize_values": [(X, None, "e4m3", None, *DRAW), (X.bfloat16(), ROWS, "int4", "stochastic", *DRAW)],
    "quantize_values_into": [(X, None, X.new_empty(X.shape), "e4m3", "nearest_even", *DRAW)],
    "quantize_block_values": [(X, "mxfp8", None, *DRAW), (X.half(), "nvfp4", "stochastic", *DRAW)],
    "quantize_block_values_into": [(X, X.new_empty(X.shape), "mxfp4", None, *DRAW)],
    "encode": [(X, None, "e4m3", None, *DRAW, "saturate"), (X, None, "dlfloat16", "stochastic", *DRAW, "ieee")],
    "first_step": [(X, X.new_zeros(1), 127.0, False), (W, W.new_zeros(1), 7.0, True)],
    "decode": [(torch.arange(120, dtype=torch.uint8), "e5m2"), (torch.arange(16).view(4, 4).t(), "nf4")],
    "pack": [
        *((torch.ones(4, 8, 12, dtype=dtype), text) for dtype in (torch.float32, torch.bfloat16)
          for text in (E4M3, "int4", "mxfp4 nearest_even column")),
        (torch.ones(2, 3, 40).transpose(0, 1), "nvfp4 nearest_even row"),
    ],
    "unpack": [
        (torch.zeros(384, dtype=torch.uint8), (4, 8, 12), E4M3, torch.bfloat16),
        (torch.zeros(193, dtype=torch.uint8), (4, 8, 12), "int4", torch.float32),
        (torch.zeros(204, dtype=torch.uint8), (4, 8, 12), "mxfp4 nearest_even column", torch.bfloat16),
    ],
    "encode_blocks": [
        (X, "mxfp8", None, *DRAW), (X.bfloat16(), "nvfp4", "stochastic", *DRAW), (X.mT, "mxint8", None, *DRAW),
        (X.double(), "mxfp4:scale=rceil", None, *DRAW),
    ],
    "decode_blocks": [(torch.arange(64, dtype=torch.uint8).view(2, 32) % 16, torch.full((2, 2), 56, dtype=torch.uint8),
                       torch.tensor(3.0), "nvfp4")],
    "scale": [(X, f"{E4M3} row/amax", "")],
    "rotate_values": [
        *((X.to(dtype), f"mxfp4 stochastic {along} hadamard16[random]", 7, 1, 2) for along in ("row", "batched-column")
          for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        (X.mT, "nvfp4 nearest_even column hadamard128[bf16]", 0, 0, 0),
        (torch.empty(0, 4), f"{E4M3} hadamard32", 0, 0, 0),
    ],
    "cast_blocks": [
        (X, "mxfp4 stochastic row hadamard16[random]", torch.bfloat16, 7, 1, 2, 3),
        (X.mT, "nvfp4 nearest_even column", torch.float32, 7, 1, 2, 3),
        (X.double(), "nvfp4-2d nearest_even", torch.float32, 7, 1, 2, 3),
    ],
    "rotate": [(X, (1, 2, 3, 4), "mxfp4 stochastic row hadamard16[random]", 0, 0, "")],
    "quantize": [(X, None, (0, 0, 0, 0), E4M3, 0, 0, "")],
    "gemm": [(X, W, None, [X, None, W, None, W, None, X, None], (0, 0, 0, 0), -1, PLAIN[0], None, "", "")],
}  # fmt: skip


def test_every_op_has_a_sample() -> None:
    assert all((block_codes, lsq, matrix_product, public, site_products, traced)), "all that declares ops is imported"
    assert set(SAMPLES) == set(OPS)


@pytest.mark.parametrize("name", [name for name in SAMPLES if OPS[name].fake is not None])
def test_autocast_changes_nothing_inside(name: str) -> None:
    """Products of torch in a kernel would be rounded to bf16, and then by the policy."""
    for args in SAMPLES[name]:
        found = []
        for is_on in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
                results = getattr(torch.ops.lp, name).default(*copy.deepcopy(args))
            found.append([results] if isinstance(results, torch.Tensor) else results or [])
        for plain, cast in zip(*found, strict=True):
            assert plain.dtype == cast.dtype
            assert torch.equal(plain.nan_to_num(), cast.nan_to_num())


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name in SAMPLES for number in range(len(SAMPLES[name]))]
)
def test_opcheck(name: str, number: int) -> None:
    torch.library.opcheck(getattr(torch.ops.lp, name).default, SAMPLES[name][number])


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.backward])
def test_opcheck_of_gradients(name: str) -> None:
    args = tuple(a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in SAMPLES[name][0])
    torch.library.opcheck(getattr(torch.ops.lp, name).default, args)


def test_what_an_op_writes_is_declared() -> None:
    for name, op in OPS.items():
        assert name.endswith("_into") == ("(a!)" in op.schema)


def test_only_one_file_asks_for_the_address_of_a_tensor() -> None:
    root = Path(lpcompile.__file__).parents[1]
    sources = [path for top in ("runtime", "passes", "lpcompile", "launch") for path in (root / top).rglob("*.py")]
    asking = [path.relative_to(root).as_posix() for path in sources if re.search(r"\.data_ptr\(", path.read_text())]
    assert asking == ["runtime/kernels/cpu/address.py"]

"""Peers: casts that a user would pick instead, where their packages are installed (`pip install 'lpcompile[peers]'`).

    native    torch's own float8 dtype and back
    ml_dtypes numpy's extension types, on the same memory
    qtorch    QPyTorch's float_quantize, nearest and stochastic
    torchao   its MX quantization and dequantization

A peer that is missing is left out, with a sentence.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Contenders = dict[str, Callable[[], object]]


def cast_peers(x: Tensor) -> tuple[Contenders, list[str]]:
    """Contenders that take fp32 x to grid values in fp32, by name, and one sentence for each peer that is missing."""
    found: Contenders = {"torch: x.to(e4m3).float()": lambda: x.to(torch.float8_e4m3fn).float()}
    missing = []
    for name, add in (("ml_dtypes", _ml_dtypes), ("qtorch", _qtorch), ("torchao", _torchao)):
        try:
            found |= add(x)
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            missing.append(f"{name} is not measured: {str(error).splitlines()[0]}")
    return found, missing


def _ml_dtypes(x: Tensor) -> Contenders:
    package: Any = importlib.import_module("ml_dtypes")
    values = x.numpy()
    return {"ml_dtypes: to e4m3 and back": lambda: values.astype(package.float8_e4m3fn).astype("float32")}


def _qtorch(x: Tensor) -> Contenders:
    quant: Any = importlib.import_module("qtorch.quant")
    quant.float_quantize(x[:1], 4, 3)  # its extension is compiled at the first import
    return {
        "qtorch 1-4-3 nearest": lambda: quant.float_quantize(x, 4, 3, rounding="nearest"),
        "qtorch 1-4-3 stochastic": lambda: quant.float_quantize(x, 4, 3, rounding="stochastic"),
    }


def _torchao(x: Tensor) -> Contenders:
    mx: Any = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
    e4m3 = torch.float8_e4m3fn

    def round_trip() -> object:
        return mx.MXTensor.to_mx(x, e4m3, 32).dequantize(torch.float32)

    round_trip()
    return {"torchao mxfp8 and back": round_trip}

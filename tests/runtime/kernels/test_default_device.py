"""A default device or dtype of the process is the user's: importing under one, and running CPU tensors under one."""

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
RUN = """
import sys, torch
from torch import nn
device, dtype, when = sys.argv[1:]
def set_defaults():
    torch.set_default_device(device)
    torch.set_default_dtype(getattr(torch, dtype))
def reset():
    torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)
set_defaults()
import lpcompile
from lpcompile import load_policy
from runtime import gemm
from runtime.numerics import FORMATS, decode, encode, quantize
reset()
generator = torch.Generator("cpu").manual_seed(0)
x = torch.randn(4, 64, generator=generator)
policies = ["fp8-rowwise", "int8", "hfp8", "bf16", "fp16"]
models = []
for name in policies:
    torch.manual_seed(0)
    models.append(lpcompile.lpcompile(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)), name))
if when == "always":
    set_defaults()
for model in models:
    model(x).sum().backward()
    print([float(p.grad.double().sum()) for p in model.parameters()], float(model(x).double().sum()))
for format in ("e4m3", "nf4", "mxfp8", "nvfp4", "e8m0", "int8"):
    print(float(quantize(x, format).double().sum()))
    print(float(quantize(x, format, "stochastic", seed=3).double().sum()))
for format in ("e4m3", "nf4", "int8"):
    print(float(decode(encode(x, format), format).double().sum()))
print(float(quantize(x * 1e4, "e5m2", overflow="ieee").double().nan_to_num(0, 1, -1).sum()))
for accumulate in ("1-6-9/8", "fp32", "1-6-9 stochastic", "1-8-22"):
    print(float(gemm(x, x.t(), a_format="e4m3", b_format="e4m3", accumulate=accumulate).double().sum()))
"""


@lru_cache
def _run(device: str, dtype: str, when: str) -> str:
    command = [sys.executable, "-c", RUN, device, dtype, when]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


@pytest.mark.parametrize(
    ("device", "dtype", "when"),
    [
        ("meta", "float32", "import"),
        ("meta", "float64", "always"),
        pytest.param("cuda", "float32", "import", marks=pytest.mark.slow),
        pytest.param("cpu", "bfloat16", "always", marks=pytest.mark.slow),
    ],
)
def test_defaults_of_the_process_change_nothing(device: str, dtype: str, when: str) -> None:
    """A segmentation fault under fp8-rowwise and int8, once the package was imported under `meta`."""
    assert _run(device, dtype, when) == _run("cpu", "float32", "import")

"""What falls to the reference for many products says so once a site and role, with the reason and what to try."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lpcompile import lpcompile
from runtime.errors import SlowPathWarning
from runtime.kernels import registry
from runtime.kernels.cpu import accumulate, accumulate_conv, accumulate_wide
from runtime.numerics import reference_gemm


def _policy(folder: Path) -> Path:
    path = folder / "slow.yaml"
    path.write_text(
        "version: 1\nname: slow\nsource: a test\nrules:\n  - match: {op: [linear, conv2d]}\n"
        "    fwd: {x: e4m3, w: e4m3, accumulate: 1-6-9}\n"
        "    bwd: {dy: e5m2, w: e4m3, accumulate: 1-6-9}\n"
        "    grad: {dy: e5m2, x: e4m3, accumulate: 1-6-9}\n"
    )
    return path


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_says_once_which_site_and_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    for module, name in ((accumulate, "accumulate_library"), (accumulate_wide, "wide_library")):
        monkeypatch.setattr(module, name, lambda: None)
    monkeypatch.setattr(accumulate_conv, "direct", lambda _: None)
    monkeypatch.setattr(reference_gemm, "MANY_PRODUCTS", 100)
    monkeypatch.setattr(registry, "fault_of", lambda *_: "")
    layer: nn.Module = nn.Linear(8, 9) if kind == "linear" else nn.Conv2d(3, 4, 3)
    x = torch.randn(5, 8) if kind == "linear" else torch.randn(2, 3, 7, 7)
    model = nn.ModuleDict({f"slow_{kind}": layer})
    lpcompile(model, _policy(tmp_path))
    x.requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            layer(x).sum().backward()
    said = [str(each.message) for each in caught if issubclass(each.category, SlowPathWarning)]
    assert [text.split(":")[0] for text in said] == [f"slow_{kind} {role}" for role in ("fwd", "bwd", "grad")]
    assert all("no C++ compiler" in text and "Try sums in fp32" in text for text in said)


def test_few_products_are_not_worth_a_word(tmp_path: Path) -> None:
    model = lpcompile(nn.Linear(8, 9), _policy(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPathWarning)
        model(torch.randn(5, 8)).sum().backward()

"""The recipes of other systems under examples/policies/: each loads, fits a small model without a warning, and runs
every GEMM as it says. docs/policies.md lists them all, and every policy in it loads.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile import load_policy, lpcompile, report
from lpcompile.compiled import get_compiled
from runtime.numerics.specs import LayerSpec
from tests.lpcompile.checked import check_model

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples" / "policies").glob("*.yaml"))
MIXTURES = ("megatron-moe", "torchtitan-mxfp8-moe", "modelopt-fp8", "modelopt-nvfp4")
IMAGES = ("modelopt-int8-convolutions", "fms-mo-int8")


def _language_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "use_cache": False,
    }  # fmt: skip
    if kind == "mixture":
        sizes |= {"num_local_experts": 4, "num_hidden_layers": 1}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))  # type: ignore[no-any-return]
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))  # type: ignore[no-any-return]


def _image_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4)
    )


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    if name in IMAGES:
        return _image_model(), {"input": torch.randn(2, 3, 8, 8)}
    ids = torch.arange(12).view(2, 6)
    return _language_model("mixture" if name in MIXTURES else "llama"), {"input_ids": ids}


@cache
def _specs(name: str) -> dict[str, LayerSpec | None]:
    model, _ = build(name)
    resolution, _ = check_model(model, load_policy(ROOT / "examples" / "policies" / f"{name}.yaml"))
    return resolution.specs


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_and_runs_as_it_says(path: Path) -> None:
    model, call = build(path.stem)
    original, _ = build(path.stem)
    compiled = lpcompile(model, path, example_kwargs=call if path.stem in MIXTURES else None, strict=True)
    found = report(compiled)
    assert found.gemms
    assert [str(finding) for finding in found.warnings] == []
    assert all(row.runs_as_policy_says for row in found.gemms)
    uses = get_compiled(compiled).phase.resolution.rules
    assert all(use.num_rows for use in uses if use.is_told)
    before, after = (_output(each, call) for each in (original, compiled))
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    assert float((after - before).norm() / before.norm()) < 0.5


def _output(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**call)
    return out if isinstance(out, Tensor) else out.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "site", "fwd"),
    [
        ("te-block-scaling", "model.layers.0.mlp.up_proj", "e4m3 block[1,128]/pow2 * e4m3 block[128,128]/pow2"),
        ("megatron-fp8-first-last-bf16", "model.layers.0.mlp.up_proj", "bf16 * bf16"),
        ("megatron-fp8-first-last-bf16", "model.layers.2.mlp.up_proj", "e4m3 tensor/amax * e4m3 tensor/amax"),
        ("megatron-fp8-first-last-bf16", "model.layers.3.mlp.up_proj", "bf16 * bf16"),
        ("torchtitan-float8", "model.layers.1.self_attn.k_proj", "bf16 * bf16"),
        ("torchtitan-float8", "model.layers.1.self_attn.q_proj", "e4m3 row/amax * e4m3 row/amax"),
        ("torchao-int8-dynamic-activation", "model.layers.1.mlp.down_proj", "int8 row/amax * int8 channel/amax"),
        ("torchao-int4-weight-only", "model.layers.1.mlp.down_proj", "bf16 * int4 block[1,128]/amax"),
        ("qlora-nf4", "model.layers.1.mlp.down_proj", "bf16 * nf4 block[1,64]/amax"),
        ("modelopt-int8-convolutions", "2", "int8 tensor/amax * int8 channel/amax"),
        ("fms-mo-pact-lsq", "model.layers.1.mlp.down_proj", "int8 pact[init=8.0] * int4 lsq"),
        ("fms-mo-hfp8-chunks", "model.layers.1.mlp.down_proj", "hfp8-143 * hfp8-143"),
    ],
)
def test_what_an_example_says_of_a_site(name: str, site: str, fwd: str) -> None:
    spec = _specs(name)[site]
    assert spec is not None
    assert f"{spec.fwd.lhs} * {spec.fwd.rhs}".replace(" nearest_even", "") == fwd


def test_the_guide_lists_every_example() -> None:
    text = (ROOT / "docs" / "policies.md").read_text()
    assert [path.stem for path in EXAMPLES if f"examples/policies/{path.name}" not in text] == []
    assert len(EXAMPLES) == 24


def test_every_policy_in_the_guide_loads(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "policies.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        assert load_policy(path).rules

"""Routers of mixtures of experts stay as the model has them under every shipped policy but the one that is autocast."""

from typing import Any

import pytest
import torch

from lpcompile import load_policy, lpcompile, report
from lpcompile.compiled import get_compiled

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "use_cache": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
    "DeepseekV3": {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
}  # fmt: skip


def build(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("name", MODELS)
def test_routers_are_left_alone(name: str) -> None:
    model = lpcompile(build(name), "fp8-rowwise", example_kwargs={"input_ids": torch.arange(8).view(2, 4)})
    found = report(model)
    assert found.unmatched_rules == []
    assert any(".mlp.gate." in site for site in found.left_alone)
    for policy in ("fp8-rowwise", "hfp8", "int8", "fp16"):
        specs = load_policy(policy).resolve(get_compiled(model).sites).specs
        routers = [site for site in specs if ".mlp.gate." in site or site.endswith("shared_expert_gate")]
        assert [specs[router] for router in routers] == [None] * len(routers)
        assert len(routers) >= 1
        assert all(specs[site] is not None for site in specs if "gate_up_proj" in site or site.endswith("o_proj"))

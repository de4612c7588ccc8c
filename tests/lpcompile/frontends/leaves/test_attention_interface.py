"""Attention of transformers through its interface: each model's eager attention to the bit, reached with a cache."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lpcompile import lpcompile, report, use_lp_attention
from lpcompile.api import run_state
from lpcompile.errors import LoweringError, LpError
from lpcompile.frontends.leaves.attention_interface import CoreAttention
from lpcompile.policy.resolve import Policy
from tests.models_for_tests import tiny_llama
from tests.zoo.models import ZOO, build, differences, run

_SLOW = ("qwen3", "bert", "t5", "vit", "mixtral", "whisper", "swin")
NAMES = ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW)]

_INT8 = {"format": "int8", "scale": {"rule": "amax"}}
INT8_ATTENTION = Policy.model_validate(
    {"version": 1, "name": "p", "rules": [{"match": {"op": "matmul"}, "fwd": {"a": _INT8, "b": _INT8}}]}
)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_models_eager_attention_compiled_or_not(name: str) -> None:
    original, batch = build(name), ZOO[name].batch(0)
    model = use_lp_attention(copy.deepcopy(original))
    assert list(model.state_dict()) == list(original.state_dict())
    assert differences(run(model.eval(), batch), run(original.eval(), batch)) == []
    lpcompile(model, "fp32-emulated", example_kwargs=batch, strict=True)
    assert sum(row.name.endswith("core_attention.qk") for row in report(model).gemms) > 0
    assert len(report(model).gemms) == 3 * ZOO[name].num_sites
    for training in (True, False):
        model.train(training), original.train(training)
        for seed in (0, 1):
            found = run(model, ZOO[name].batch(seed))
            assert differences(found, run(original, ZOO[name].batch(seed)), ZOO[name].tolerance) == []


def _cached(model: nn.Module) -> nn.Module:
    model.config.use_cache = True
    return model


def test_what_a_cache_hides_is_refused_by_name_and_reached_through_the_interface() -> None:
    batch = ZOO["llama"].batch(0)
    hidden = lpcompile(_cached(build("llama")), "fp32-emulated", example_kwargs=batch)
    rows = {row.name: row for row in report(hidden).gemms if row.role == "fwd" and not row.runs_as_policy_says}
    assert set(rows) == {f"model.layers.{layer}.self_attn.matmul_{n}" for layer in (0, 1) for n in (0, 1)}
    assert all("modeling_llama.py:" in row.reason and "DynamicCache" in row.reason for row in rows.values())
    with pytest.raises(LoweringError, match=r"self_attn\.matmul_0.*DynamicCache"):
        lpcompile(hidden, "fp32-emulated", example_kwargs=batch, strict=True)
    original = _cached(build("llama"))
    reached = lpcompile(use_lp_attention(copy.deepcopy(original)), "fp32-emulated", example_kwargs=batch, strict=True)
    assert differences(run(reached, batch), run(original, batch)) == []
    assert run_state(reached).gemm_calls == ZOO["llama"].num_gemms


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_generate_with_a_cache_runs_attention_in_low_precision(name: str) -> None:
    batch = ZOO[name].batch(0)
    prompt = {"input_ids": batch["input_ids"][:1, :6], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    model = lpcompile(use_lp_attention(_cached(build(name).eval())), INT8_ATTENTION)  # no example inputs
    ids = model.generate(**prompt)
    assert ids.shape == (1, 10)
    assert run_state(model).gemm_calls == 4 * 2 * 2  # tokens, layers, products
    logits = model(ids).logits
    model.set_attn_implementation("eager")
    assert not torch.equal(logits, model(ids).logits)
    assert torch.nn.functional.cosine_similarity(logits.flatten(), model(ids).logits.flatten(), dim=0) > 0.99


def test_gradients_reach_queries_keys_and_values() -> None:
    """Each role in int8 moves the gradients of all three projections, by little."""
    operand = {"fwd": {"a": _INT8, "b": _INT8}, "bwd": {"dy": _INT8, "b": _INT8}, "grad": {"dy": _INT8, "a": _INT8}}
    rule = {"match": {"name": "*core_attention*"}, **operand}
    policy = Policy.model_validate({"version": 1, "name": "p", "rules": [rule]})
    original, batch = build("llama"), ZOO["llama"].batch(0)
    model = lpcompile(use_lp_attention(copy.deepcopy(original)), policy, strict=True)
    found, wanted = run(model, batch), run(original, batch)
    for projection in ("q", "k", "v"):
        key = f"grad model.layers.0.self_attn.{projection}_proj.weight"
        assert not torch.equal(found[key], wanted[key])
        assert torch.nn.functional.cosine_similarity(found[key].flatten(), wanted[key].flatten(), dim=0) > 0.97


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_call_their_own_attention(clone: object) -> None:
    model = lpcompile(use_lp_attention(build("llama")), INT8_ATTENTION)
    twin = clone(model)  # type: ignore[operator]
    cores = [module for module in twin.modules() if isinstance(module, CoreAttention)]
    assert [vars(core)["owner"] for core in cores] == [layer.self_attn for layer in twin.model.layers]
    batch = ZOO["llama"].batch(0)
    assert differences(run(twin, batch), run(model, batch)) == []
    assert run_state(twin).gemm_calls == run_state(model).gemm_calls == 4


def test_a_model_without_such_attention_gets_a_sentence() -> None:
    with pytest.raises(LpError, match="attention interface"):
        use_lp_attention(nn.Sequential(nn.Linear(2, 2)))
    model = tiny_llama()
    use_lp_attention(build("llama"))  # which registers the name
    model.set_attn_implementation("lp")
    with pytest.raises(LpError, match="use_lp_attention"):
        model(torch.zeros(1, 2, dtype=torch.long))


def test_an_argument_that_the_models_eager_attention_does_not_read_is_refused_aloud() -> None:
    model = use_lp_attention(build("llama"))
    core = next(module for module in model.modules() if isinstance(module, CoreAttention))
    owner = vars(core)["owner"]
    heads, width = owner.config.num_attention_heads, owner.head_dim
    q = torch.randn(1, heads, 3, width)
    k = torch.randn(1, heads // owner.num_key_value_groups, 3, width)
    options = {"scaling": 1.0, "dropout": 0.0}
    y, _ = core(q, k, k, None, **options)
    bias = torch.full((1, heads, 3, 3), 9.0)
    carried = {"sliding_window": 7, "position_ids": torch.arange(3), "position_bias": None}
    for compiled in (False, True):
        if compiled:
            lpcompile(model, "fp32-emulated")
        assert torch.equal(core(q, k, k, None, **options, **carried)[0], y)
        with pytest.raises(LpError, match=r"does not read position_bias. Expected None, or one of scaling, dropout"):
            core(q, k, k, None, **options, position_bias=bias)

"""generate(): the same tokens under fp32, and really low precision under int8."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile import Policy, lpcompile
from lpcompile.api import run_state
from tests.zoo.models import ZOO, Batch, build, names
from tests.zoo.sites import SITES


def _generate(model: nn.Module, batch: Batch, **options: Any) -> Any:
    prompt = {key: batch[key][:1, :6] for key in ("input_ids", "attention_mask")}
    return model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0, **options)


def _logits(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Of each token that generate() chooses."""
    return _generate(model, batch, output_logits=True, return_dict_in_generate=True).logits


@pytest.mark.parametrize("policy", ["fp32", "fp32-emulated"])
@pytest.mark.parametrize("name", names(lambda model: model.can_generate))
def test_the_same_tokens(name: str, policy: str) -> None:
    original, batch = build(name).eval(), ZOO[name].batch(0)
    model = lpcompile(copy.deepcopy(original), policy, example_kwargs=batch)
    for use_cache in (False, True):
        model.generation_config.use_cache = original.generation_config.use_cache = use_cache
        assert torch.equal(_generate(model, batch), _generate(original, batch))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", names(lambda model: model.can_generate))
def test_low_precision_is_used(name: str, use_cache: bool) -> None:
    """int8 gives other logits than fp32, at every token, and near ones at the first: both were given the same."""
    original, batch = build(name).eval(), ZOO[name].batch(0)
    model = lpcompile(copy.deepcopy(original), "int8", example_kwargs=batch)
    model.generation_config.use_cache = original.generation_config.use_cache = use_cache
    model(**batch)
    per_forward = run_state(model).gemm_calls
    found, exact = _logits(model, batch), _logits(original, batch)
    assert run_state(model).gemm_calls > 2 * per_forward
    assert len(found) == len(exact) == 5
    assert not any(torch.equal(a, b) for a, b in zip(found, exact))
    assert torch.nn.functional.cosine_similarity(found[0].flatten(), exact[0].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("with_examples", [True, False])
@pytest.mark.parametrize("name", names(lambda model: model.can_generate))
def test_attention_products_run_as_said_with_a_cache(name: str, with_examples: bool, beams: int) -> None:
    """Every product of every token, greedy and with a beam; mamba writes only what is no attention."""
    batch = ZOO[name].batch(0)
    rule = {"match": {"op": "matmul"}, "fwd": {"x": "e4m3", "w": "e4m3"}}
    policy = Policy.model_validate({"version": 1, "name": "attention", "rules": [rule]})
    model = lpcompile(build(name).eval(), policy, example_kwargs=batch if with_examples else None, strict=True)
    model.generation_config.use_cache = True
    calls = run_state(model).calls
    _generate(model, batch, num_beams=beams, min_new_tokens=5)
    sites = [site for site in SITES[name] if "matmul_" in site and calls.seen(site, "fwd")]
    assert sites
    for site in sites:
        assert calls.seen(site, "fwd") == calls.as_said(site, "fwd")
        is_of_prompt = name == "mamba" and not site.endswith("matmul_0")  # its scan has a product per position
        assert calls.seen(site, "fwd") >= 5 or "encoder" in site or is_of_prompt

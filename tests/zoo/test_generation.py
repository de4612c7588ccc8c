"""generate(): the same tokens under fp32, and really low precision under int8."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile
from lpcompile.api import run_state
from tests.zoo.models import ZOO, Batch, build, names


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

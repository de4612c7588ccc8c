"""Coverage: every function that multiplies matrices in a model of the zoo runs as compiled sites, and none is missed.

Counted at torch functions, first in the original model and then beside the compiled sites of the compiled one.
"""

from collections import Counter

import pytest
import torch

from lpcompile import Policy, lpcompile, report
from lpcompile.api import run_state
from tests.zoo.counting import count_products
from tests.zoo.models import NAMES, ZOO, build
from tests.zoo.sites import SITES

EVERYTHING = Policy.model_validate(
    {"version": 1, "name": "everything", "rules": [{"match": {"name": "*"}, "fwd": {"x": "e4m3", "w": "e4m3"}}]}
)

NEVER_CALLED = {"mamba": {f"backbone.layers.{i}.mixer.{leaf}" for i in (0, 1) for leaf in ("conv1d", "dt_proj")}}
"""Leaves whose weights the model multiplies by functions, which are sites of their own."""


@pytest.mark.parametrize("with_examples", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_product_is_reached(name: str, training: bool, with_examples: bool) -> None:
    """And under the name that a policy file may have it by; without examples as it runs."""
    entry, model = ZOO[name], build(name)
    batch = entry.batch(0)
    model.train(training)
    assert count_products(model, batch).total() == entry.num_sites
    lpcompile(model, EVERYTHING, example_kwargs=batch if with_examples else None, strict=True)
    assert count_products(model, batch) == Counter()
    assert run_state(model).gemm_calls == entry.num_gemms
    found = report(model)
    assert found.unreached == {}
    assert found.left_alone == []
    assert all(row.runs_as_policy_says for row in found.gemms)
    assert {row.name for row in found.gemms} == set(SITES[name])
    counts = run_state(model).calls
    assert all(counts.seen(site, "fwd") == counts.as_said(site, "fwd") for site in SITES[name])
    assert {site for site in SITES[name] if not counts.seen(site, "fwd")} == NEVER_CALLED.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_without_gradients_runs_low_precision(name: str) -> None:
    """Also where torch has a faster way that calls no module (TransformerEncoder)."""
    entry, model = ZOO[name], build(name).eval()
    batch = entry.batch(0)
    with torch.no_grad():
        expected = model(**batch)["logits"]
        lpcompile(model, "int8", example_kwargs=batch)
        found = model(**batch)["logits"]
    assert run_state(model).gemm_calls > 0
    if "attention_mask" in batch:  # the fast way gives zeros for padding, the usual one does not
        found, expected = (logits[batch["attention_mask"] != 0] for logits in (found, expected))
    assert not torch.equal(found, expected)
    size = expected.abs().max()
    assert torch.nn.functional.cosine_similarity(found.flatten() / size, expected.flatten() / size, dim=0) > 0.98


@pytest.mark.slow
def test_experts_are_named_by_layer() -> None:
    model = build("mixtral")
    lpcompile(model, "fp32-emulated", example_kwargs=ZOO["mixtral"].batch(0))
    ops = {row.name: row.op for row in report(model).gemms}
    for layer in range(2):
        assert ops[f"model.layers.{layer}.mlp.experts.gate_up_proj"] == "linear"
        assert ops[f"model.layers.{layer}.mlp.experts.down_proj"] == "linear"

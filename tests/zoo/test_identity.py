"""A compiled model is still the model: keys, class, copies, saving and loading, another dtype."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lpcompile import lpcompile
from lpcompile.api import run_state
from tests.zoo.models import NAMES, ZOO, build, differences, run


def _compiled(name: str, policy: str) -> nn.Module:
    return lpcompile(build(name), policy, example_kwargs=ZOO[name].batch(0))


@pytest.mark.parametrize("policy", ["fp32-emulated", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_keys_and_class_stay(name: str, policy: str) -> None:
    original, model = build(name), _compiled(name, policy)
    assert list(model.state_dict()) == list(original.state_dict())
    assert isinstance(model, type(original))
    assert [path for path, _ in model.named_modules()] == [path for path, _ in original.named_modules()]
    model.load_state_dict(original.state_dict(), strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_deep_copy_computes_the_same_on_its_own(name: str) -> None:
    model, batch = _compiled(name, "hfp8"), ZOO[name].batch(0)
    twin = copy.deepcopy(model)
    assert differences(run(twin, batch), run(model, batch)) == []
    assert run_state(twin) is not run_state(model)
    assert run_state(twin).gemm_calls == run_state(model).gemm_calls > 0


@pytest.mark.parametrize("name", NAMES)
def test_another_dtype_after_compiling(name: str) -> None:
    entry, original, model = ZOO[name], build(name), _compiled(name, "fp32-emulated")
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in entry.batch(0).items()}
    found, wanted = run(model.to(torch.bfloat16), batch), run(original.to(torch.bfloat16), batch)
    assert found["logits"].dtype == wanted["logits"].dtype
    if name == "lstm":  # its cells add in another order than torch's fused ones
        torch.testing.assert_close(found["logits"], wanted["logits"], rtol=0.02, atol=0.02)
    else:
        assert differences(found, wanted) == []
    assert run_state(model).gemm_calls > 0


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, original = _compiled(name, "int8"), build(name)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path)
        loaded = type(original).from_pretrained(tmp_path, attn_implementation=original.config._attn_implementation)
    else:
        torch.save(model.state_dict(), tmp_path / "model.pt")
        loaded = copy.deepcopy(original)
        loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    batch = ZOO[name].batch(0)
    saved, wanted = loaded.state_dict(), original.state_dict()
    assert list(saved) == list(wanted)
    assert all(torch.equal(saved[key], wanted[key]) for key in wanted)
    with torch.no_grad():  # not to the bit: a weight loaded elsewhere in memory may take another path of a library
        found, expected = loaded.eval()(**batch)["logits"], original.eval()(**batch)["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))

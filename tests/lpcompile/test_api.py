"""lpcompile on real models: nothing changes under fp32 and fp32-emulated, everything named runs under the rest, and
it can be undone.
"""

import contextlib
import copy
import gc
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lpcompile import Policy, advance, attach, load_policy, lpcompile, original_state_dict, report
from lpcompile.api import restore, run_state
from lpcompile.errors import LoweringError, LpError
from runtime.numerics.specs import GemmSpec, LayerSpec, QuantSpec
from runtime.ops import product
from runtime.quantize import quantizer
from runtime.quantize.cast_memo import MEMO, CastMemo
from tests.models_for_tests import TinyResNet, image_batch, tiny_gpt2, tiny_llama, token_batch

Call = dict[str, Any]


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[[], Call], int]] = {
    "llama": (tiny_llama, token_batch, 19),  # 2 x (7 linear + 2 matmul) + head
    "gpt2": (tiny_gpt2, token_batch, 13),  # 2 x (4 linear + 2 matmul) + head
    "resnet": (TinyResNet, image_batch, 7),  # stem, 2 x 2 in the blocks, shortcut, classifier
}


def _build(name: str) -> tuple[nn.Module, nn.Module, Call]:
    make, call, _ = MODELS[name]
    torch.manual_seed(0)
    model = make()
    return model, copy.deepcopy(model), call()


def _loss_and_grads(model: nn.Module, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)  # dropout
    model.zero_grad()
    loss = model(**call)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", ["fp32", "fp32-emulated"])
@pytest.mark.parametrize("name", MODELS)
def test_fp32_policies_change_no_bit(name: str, policy: str, training: bool) -> None:
    model, original, call = _build(name)
    lpcompile(model, policy, example_kwargs=call)
    model.train(training)
    original.train(training)
    loss, grads = _loss_and_grads(model, call)
    expected_loss, expected_grads = _loss_and_grads(original, call)
    assert torch.equal(loss, expected_loss)
    assert _same(grads, expected_grads)
    assert _same(dict(model.named_buffers()), dict(original.named_buffers()))


@pytest.mark.parametrize("name", MODELS)
def test_emulation_executes_every_gemm_site(name: str) -> None:
    model, _, call = _build(name)
    sites = MODELS[name][2]
    lpcompile(model, "fp32-emulated", example_kwargs=call, strict=True)
    found = report(model)
    assert len({row.name for row in found.gemms}) == sites
    assert not found.left_alone
    model(**call)
    assert run_state(model).gemm_calls == sites
    assert report(model).unserved == ""


def test_perturbing_one_cast_changes_the_loss() -> None:
    """The bitwise checks above can fail: a disturbance of one cast of one site is seen."""
    model, _, call = _build("llama")
    lpcompile(model, "fp32-emulated", example_kwargs=call)
    before, grads_before = _loss_and_grads(model, call)
    leaf = model.model.layers[1].mlp.down_proj
    planned = vars(leaf)["_lp_captured"].phases[0][""].func
    planned.spec = LayerSpec(fwd=GemmSpec(lhs=QuantSpec("1-8-8")))
    planned.is_identity, planned.kernels = False, ("fp32", "fp32", "fp32")
    planned._plans.clear()
    after, grads_after = _loss_and_grads(model, call)
    assert not torch.equal(before, after)
    assert not _same(grads_before, grads_after)


@pytest.mark.parametrize("policy", ["bf16", "fp16", "hfp8", "fp8-rowwise", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_low_precision_is_near_and_not_equal(name: str, policy: str) -> None:
    model, original, call = _build(name)
    lpcompile(model, policy, example_kwargs=call, strict=True)
    loss, grads = _loss_and_grads(model, call)
    expected_loss, expected_grads = _loss_and_grads(original, call)
    assert not torch.equal(loss, expected_loss)
    torch.testing.assert_close(loss, expected_loss, rtol=2e-3, atol=0)
    for key, grad in grads.items():
        assert nn.functional.cosine_similarity(grad.flatten(), expected_grads[key].flatten(), dim=0) > 0.97, key
    assert all(row.runs_as_policy_says for row in report(model).gemms)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["hfp8", "fp32-emulated"])
def test_the_model_stays_the_model(name: str, policy: str) -> None:
    model, original, call = _build(name)
    keys = list(model.state_dict())
    compiled = lpcompile(model, policy, example_kwargs=call)
    assert compiled is model
    assert isinstance(model, type(original))
    assert type(model).__name__ == type(original).__name__
    assert list(model.state_dict()) == keys == list(original_state_dict(model))
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    model.load_state_dict(original.state_dict(), strict=True)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in original.named_modules()]


def test_llama_shares_casts_of_qkv_and_of_gate_up() -> None:
    model, _, call = _build("llama")
    lpcompile(model, "fp32-emulated", example_kwargs=call)
    found = report(model)
    # 15 leaves x 2 + 4 products x 2; in each of 2 layers q, k, v cast x once, not thrice, and gate, up once, not twice
    assert (found.num_quantize_before, found.num_quantize_after) == (38, 38 - 2 * (2 + 1))
    lpcompile(model, "hfp8", example_kwargs=call)
    found = report(model)
    assert (found.num_quantize_before, found.num_quantize_after) == (30, 30 - (1 + 1) - (2 + 1)), (
        "q of layer 0 is `first`: bf16"
    )


def test_shared_casts_are_counted_as_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.ops.small.LARGEST", 0)  # small layers share no casts
    model, _, call = _build("llama")
    lpcompile(model, "hfp8", example_kwargs=call)
    calls: list[str] = []
    original = quantizer.to_grid
    for module in (quantizer, product):
        monkeypatch.setattr(module, "to_grid", lambda *args: (calls.append(""), original(*args))[1])
    model(**call)
    assert len(calls) == report(model).num_quantize_after


def test_sharing_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is found again, values and gradients are the same."""
    monkeypatch.setattr("runtime.ops.small.LARGEST", 0)
    shared, alone, call = _build("llama")
    lpcompile(shared, "fp8-rowwise", example_kwargs=call)
    lpcompile(alone, "fp8-rowwise")
    assert report(shared).num_quantize_after < report(alone).num_quantize_after
    expected, before = _loss_and_grads(shared, call)[1], MEMO.num_found
    assert before > 0
    monkeypatch.setattr(CastMemo, "find_or_make", lambda memo, x, key, make, is_brief=False: make())
    assert _same(expected, _loss_and_grads(alone, call)[1])


def test_without_example_inputs_the_report_says_so() -> None:
    model, _, _ = _build("gpt2")
    lpcompile(model, "fp32-emulated")
    found = report(model)
    assert len({row.name for row in found.gemms}) == 9
    assert "no example inputs were given" in found.to_text()


def test_another_shape_is_right() -> None:
    model, original, call = _build("llama")
    lpcompile(model, "fp32-emulated", example_kwargs=call)
    other = {key: value[:1, :9] for key, value in call.items()}
    assert _same(_loss_and_grads(model, other)[1], _loss_and_grads(original, other)[1])


def test_fused_attention_is_reached_by_the_names_of_its_products() -> None:
    torch.manual_seed(0)
    model, call = tiny_llama("sdpa"), token_batch()
    original = copy.deepcopy(model)
    lpcompile(model, "fp32-emulated", example_kwargs=call, strict=True)
    names = {row.name for row in report(model).gemms}
    assert {f"model.layers.{i}.self_attn.sdpa_0.{part}" for i in range(2) for part in ("qk", "pv")} < names
    expected_loss, expected_grads = _loss_and_grads(original, call)
    loss, grads = _loss_and_grads(model, call)
    assert torch.equal(loss, expected_loss)
    assert _same(grads, expected_grads)
    assert run_state(model).gemm_calls == 19


def test_strict_refusal_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    scale = "{format: e4m3, scale: {granularity: column}}"
    file.write_text(f"version: 1\nrules:\n  - match: {{op: linear}}\n    fwd: {{x: {scale}, w: e4m3}}\n")
    untouched = tiny_llama()
    with pytest.raises(LoweringError, match=r"lm_head: .* varies along the sum"):
        lpcompile(untouched, file, strict=True)
    assert type(untouched.lm_head) is nn.Linear, "nothing was changed"


def test_a_rule_that_matches_nothing_is_told_and_refused_under_strict(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text('version: 1\nrules:\n  - match: {name: "*.q_prj"}\n    fwd: {x: e4m3, w: e4m3}\n')
    model, _, _ = _build("llama")
    lpcompile(model, file)
    assert "p.yaml:3" in report(model).unmatched_rules[0]
    with pytest.raises(LoweringError, match=r"q_prj"):
        lpcompile(model, file, strict=True)


def test_scale_along_the_sum_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    scale = "{format: e4m3, scale: {granularity: column}}"
    file.write_text(f"version: 1\nrules:\n  - match: {{op: linear}}\n    fwd: {{x: {scale}, w: e4m3}}\n")
    model, original, call = _build("llama")
    lpcompile(model, file, example_kwargs=call)
    rows = report(model).gemms
    assert {row.fidelity for row in rows} == {"refused"}
    assert "use granularity row, or rule pow2" in rows[0].reason
    assert _same(_loss_and_grads(model, call)[1], _loss_and_grads(original, call)[1])


def test_low_precision_accumulators_run_emulated(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    sums = "accumulate: {format: dlfloat16, chunk: 64}"
    roles = f"fwd: {{x: hfp8-143, w: hfp8-143, {sums}}}"
    roles += f"\n    bwd: {{dy: e5m2, w: hfp8-143, {sums}}}\n    grad: {{dy: e5m2, x: hfp8-143, {sums}}}"
    file.write_text(f"version: 1\nrules:\n  - match: {{op: linear}}\n    {roles}\n")
    model, original, call = _build("gpt2")
    lpcompile(model, file, example_kwargs=call, strict=True)
    rows = report(model).gemms
    assert {row.fidelity for row in rows} == {"emulated"}
    assert {row.accumulate for row in rows} == {"dlfloat16/64"}
    loss, grads = _loss_and_grads(model, call)
    expected = _loss_and_grads(original, call)[0]
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_schedule_switches_without_recompiling(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("version: 1\nextends: [hfp8]\nschedule: [{from_step: 0, policy: fp32}, {from_step: 2}]\n")
    model, original, call = _build("llama")
    lpcompile(model, file, example_kwargs=call)
    exact = _loss_and_grads(original, call)[1]
    seen = []
    for _ in range(3):
        seen.append(_same(_loss_and_grads(model, call)[1], exact))
        advance(model)
    assert seen == [True, True, False]
    advance(model, to_step=1)
    assert _same(_loss_and_grads(model, call)[1], exact)


def test_stochastic_bits_follow_the_clock_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "version: 1\nrules:\n  - match: {op: linear}\n    fwd: {x: {format: e4m3, rounding: stochastic}, w: e4m3}\n"
    )
    model, _, call = _build("llama")
    lpcompile(model, file, example_kwargs=call, seed=3)
    model.eval()
    with torch.no_grad():
        first = model(**call).logits
        torch.manual_seed(99)
        assert not torch.equal(model(**call).logits, first), "every call has bits of its own"
        advance(model, to_step=0)
        assert torch.equal(model(**call).logits, first), "the same step, the same bits"
        advance(model)
        second = model(**call).logits
        assert not torch.equal(second, first)
        advance(model, to_step=0)
        assert torch.equal(model(**call).logits, first)
        advance(model, to_step=0)
        run_state(model).rank = 1
        assert not torch.equal(model(**call).logits, first)


def test_micro_batches_do_not_share_stochastic_bits(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "version: 1\nrules:\n  - match: {op: linear}\n    bwd: {dy: {format: e4m3, rounding: stochastic}, w: e4m3}\n"
    )
    model, _, call = _build("llama")
    lpcompile(model, file, example_kwargs=call)
    model.train()
    first, second = _loss_and_grads(model, call)[1], _loss_and_grads(model, call)[1]
    assert not _same(first, second)
    advance(model, to_step=0)
    assert _same(_loss_and_grads(model, call)[1], first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_bitwise(reentrant: bool) -> None:
    model, plain, call = _build("llama")
    for each in (model, plain):
        lpcompile(each, "hfp8", example_kwargs=call)
        each.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss, grads = _loss_and_grads(model, call)
    expected_loss, expected_grads = _loss_and_grads(plain, call)
    assert torch.equal(loss, expected_loss)
    assert _same(grads, expected_grads)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_and_have_their_own_state(clone: Callable[[nn.Module], nn.Module]) -> None:
    model, _, call = _build("llama")
    lpcompile(model, "hfp8", example_kwargs=call)
    model.eval()
    twin = clone(model)
    assert _same(_loss_and_grads(model, call)[1], _loss_and_grads(twin, call)[1])
    calls = run_state(model).gemm_calls
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.zero_()
    assert not torch.equal(twin(**call).loss, model(**call).loss)
    assert run_state(twin) is not run_state(model)
    assert run_state(model).gemm_calls == calls + 15
    advance(twin)
    assert run_state(model).step == 0


def test_a_new_weight_is_seen() -> None:
    model, _, call = _build("llama")
    lpcompile(model, "hfp8", example_kwargs=call)
    model.eval()
    before = model(**call).loss
    model.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    assert not torch.equal(model(**call).loss, before)


def test_generate_and_save_pretrained(tmp_path: Path) -> None:
    model, original, call = _build("llama")
    lpcompile(model, "fp32-emulated", example_kwargs=call)
    model.eval(), original.eval()
    prompt = {"input_ids": call["input_ids"][:1, :8], "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**prompt), original.generate(**prompt))
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert _same(dict(loaded.state_dict()), dict(original.state_dict()))


def test_restore_and_compile_again() -> None:
    model, original, call = _build("gpt2")
    lpcompile(model, "hfp8", example_kwargs=call)
    lpcompile(model, "fp32-emulated", example_kwargs=call)
    assert _same(_loss_and_grads(model, call)[1], _loss_and_grads(original, call)[1])
    restore(model)
    assert not any(name.startswith("_lp") for module in model.modules() for name in vars(module))
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def test_attach_advances_after_each_step() -> None:
    model, _, call = _build("gpt2")
    lpcompile(model, "hfp8")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(model, optimizer)
    attach(model, optimizer)  # once more is no more
    for _ in range(2):
        _loss_and_grads(model, call)
        optimizer.step()
    assert run_state(model).step == 2
    restore(model)
    optimizer.step()


def test_a_step_of_two_optimizers_is_one_step() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "hfp8")
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model]
    for optimizer in optimizers:
        attach(model, optimizer)
    for step in range(1, 4):
        for optimizer in optimizers:
            optimizer.step()
            assert run_state(model).step == step
    optimizers[1].step()  # one that goes by itself goes on
    optimizers[1].step()
    assert run_state(model).step == 5
    copied = copy.deepcopy(model)
    alone = torch.optim.SGD(copied.parameters(), lr=0.0)
    attach(copied, alone)
    alone.step()
    assert (run_state(copied).step, run_state(model).step) == (6, 5)


def test_a_step_that_a_scaler_skips_moves_no_clock() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "bf16")
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model]
    for optimizer in optimizers:
        attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, wanted in ((1.0, 1), (torch.inf, 1), (1.0, 2)):
        scaler.scale((model(torch.ones(2, 8)) * factor).sum()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        assert run_state(model).step == wanted


def test_a_replaced_functional_linear_hides_no_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 replaces torch.nn.functional.linear in the whole process; leaves compiled afterwards are reached."""
    original = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args, **kwargs: original(*args, **kwargs))
    model = lpcompile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "fp8-rowwise", strict=True)
    rows = report(model).gemms
    assert len(rows) == 6
    assert all(row.runs_as_policy_says for row in rows)


class _Zero3Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, 3 * grad.t() @ x  # unlike what autograd would do: a lost backward shows


def test_a_functional_linear_that_is_an_autograd_function_is_told_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ZeRO-3: its backward is kept, and the certificate says that its product is its own."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": (nn.functional.linear(x, self.weight) @ self.weight).sum()}

    plain = report(lpcompile(Functional(), "fp32-emulated", (torch.ones(2, 4),), strict=True))
    assert {row.name for row in plain.gemms} == {"linear_0", "matmul_0"}
    assert plain.unreached == {}
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: _Zero3Linear.apply(x, w))
    model, call = Functional(), {"x": torch.randn(2, 4)}
    original = copy.deepcopy(model)
    with pytest.raises(LoweringError, match=r"\(root\): it calls _Zero3Linear, .*Expected every named GEMM"):
        lpcompile(model, "fp32-emulated", example_kwargs=call, strict=True)
    found = report(lpcompile(model, "fp32-emulated", example_kwargs=call))
    assert {row.name for row in found.gemms} == {"matmul_0"}
    assert "calls _Zero3Linear, an autograd.Function" in found.unreached[""]
    assert _same(_loss_and_grads(model, call)[1], _loss_and_grads(original, call)[1])


def test_what_is_not_reached_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Bilinear(8, 8, 8))
    lpcompile(model, "hfp8")
    assert report(model).unreached == {"1": "Bilinear computes its products in a way of its own"}
    assert {row.name for row in report(model).gemms} == {"0"}


def test_strict_refuses_what_is_not_reached_where_a_rule_names_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Bilinear(8, 8, 8))
    with pytest.raises(LoweringError, match=r"1: Bilinear computes its products in a way .* Try strict=False"):
        lpcompile(model, "hfp8", strict=True)
    assert run_state(model) is None
    rule = {"match": {"name": "0"}, "fwd": {"x": "e4m3", "w": "e4m3"}}
    lpcompile(model, Policy.model_validate({"version": 1, "name": "p", "rules": [rule]}), strict=True)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: lpcompile(tiny_gpt2(), "hfp9"), r"hfp8"),
        (lambda: lpcompile("gpt2", "hfp8"), r"Expected a torch.nn.Module"),
        (lambda: lpcompile(tiny_gpt2(), "hfp8", mode="serve"), r"Expected train or infer"),
        (lambda: lpcompile(nn.Linear(2, 2), 123), r"not a policy.* Got int"),
        (lambda: lpcompile(nn.Linear(2, 2), "hfp8", example_inputs=torch.ones(1, 2)), r"Got Tensor. Try .*\(x,\)"),
        (lambda: lpcompile(nn.Linear(2, 2), "hfp8", example_kwargs=[1]), r"example_kwargs: .* Got list"),
        (lambda: advance(lpcompile(nn.Linear(2, 2), "hfp8"), -1), r"Expected 0 or more. Got -1"),
        (lambda: report(tiny_gpt2()), r"was not compiled"),
        (lambda: advance(nn.Linear(2, 2)), r"was not compiled"),
    ],
)
def test_wrong_use_gets_a_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(LpError, match=sentence):
        call()


def test_load_policy_gives_what_lpcompile_takes() -> None:
    model = nn.Linear(8, 8)
    assert report(lpcompile(model, load_policy("hfp8"))).policy == "hfp8"


@pytest.mark.parametrize("policy", ["hfp8", "no such policy"])
def test_the_garbage_collector_is_as_before(policy: str) -> None:
    before = gc.get_threshold()
    gc.set_threshold(701, 11, 12)
    try:
        with contextlib.suppress(LpError):
            lpcompile(nn.Linear(4, 4), policy)
        assert gc.get_threshold() == (701, 11, 12)
    finally:
        gc.set_threshold(*before)

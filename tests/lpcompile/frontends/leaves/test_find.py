"""Leaves of several products: every product is a site, equal to torch bit for bit or within a stated bound."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lpcompile import lpcompile, report
from lpcompile.api import restore, run_state
from lpcompile.errors import LoweringError, LoweringWarning, LpError
from lpcompile.frontends.leaves import multihead_attention
from lpcompile.policy.resolve import Policy


def _policy(*ops: str, **operand: Any) -> Policy:
    """Forward products of these ops with both operands cast alike."""
    rules = [{"match": {"op": list(ops)}, "fwd": {"x": operand, "w": operand}}]
    return Policy.model_validate({"version": 1, "name": "p", "rules": rules})


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [tensor for item in result for tensor in _tensors(item)]


def _run(module: nn.Module, inputs: tuple[Any, ...], **options: Any) -> list[Tensor]:
    """Every output, and the gradients of every input and parameter."""
    module.zero_grad()
    leaves: dict[int, Tensor] = {}  # an input given twice stays one tensor

    def leaf(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(leaf, x))
        return leaves.setdefault(id(x), x.detach().clone().requires_grad_())

    torch.manual_seed(11)  # dropout
    outputs = _tensors(module(*map(leaf, inputs), **options))
    sum((y * _randn(*y.shape)).sum() for y in outputs).backward()
    grads = [x.grad for x in (*leaves.values(), *module.parameters()) if x.grad is not None]
    return [y.detach() for y in outputs] + grads


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Convolutions

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d-grouped": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2), (2, 4, 5, 6)),
    "3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), (1, 2, 1), (0, 1, 1), (1, 1, 2)), (2, 2, 4, 5, 9)),
    "3d-no-bias": (lambda: nn.Conv3d(4, 4, 3, padding=1, groups=2, bias=False), (1, 4, 3, 4, 5)),
    "1d-unbatched": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "2d-unbatched": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 8)),
    "3d-unbatched": (lambda: nn.Conv3d(2, 4, 2, padding=1), (2, 4, 5, 6)),
    "circular-unbatched": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (4, 9)),
    "transposed-1d-unbatched": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (4, 9)),
    "transposed-2d-unbatched": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 6)),
    "transposed-3d-unbatched": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 3, 4, 3)),
}


@pytest.mark.parametrize("with_examples", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_is_bitwise(case: str, with_examples: bool) -> None:
    make, shape = CONVOLUTIONS[case]
    module, inputs = nn.Sequential(make()), (_randn(*shape),)
    expected = _run(module, inputs)
    lpcompile(module, "fp32-emulated", inputs if with_examples else None, strict=True)
    assert _same(_run(module, inputs), expected)
    assert run_state(module).gemm_calls == 1


@pytest.mark.parametrize("case", [case for case in CONVOLUTIONS if "unbatched" in case])
def test_a_sample_without_a_batch_dim_is_a_batch_of_one(case: str) -> None:
    make, shape = CONVOLUTIONS[case]
    module, x = make(), _randn(*shape).requires_grad_()
    casts = {"x": "e4m3", "w": "e4m3"}, {"dy": "e5m2", "w": "e4m3"}, {"dy": "e5m2", "x": "e4m3"}
    rule = {"match": {"name": "*"}, **dict(zip(("fwd", "bwd", "grad"), casts))}
    lpcompile(module, Policy.model_validate({"version": 1, "name": "p", "rules": [rule]}), strict=True)
    y, batched = module(x), module(x[None])
    assert torch.equal(y, batched[0])
    inputs, dy = (x, *module.parameters()), _randn(*y.shape)
    assert _same([*torch.autograd.grad(y, inputs, dy)], [*torch.autograd.grad(batched, inputs, dy[None])])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_functional_convolution_of_one_sample(dims: int) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(_randn(4, 4, *(3,) * dims))

        def forward(self, x: Tensor) -> Tensor:
            conv, transposed = getattr(F, f"conv{dims}d"), getattr(F, f"conv_transpose{dims}d")
            return transposed(conv(x, self.weight, padding=1).relu(), self.weight, stride=2)

    module, inputs = Functional(), (_randn(4, *(5,) * dims),)
    expected = _run(module, inputs)
    lpcompile(module, "fp32-emulated", inputs, strict=True)
    assert _same(_run(module, inputs), expected)
    assert run_state(module).gemm_calls == 2


# Transposed convolutions and paddings

TRANSPOSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 9)),
    "2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), (2, 4, 5, 6)),
    "2d-grouped": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 0), groups=2), (2, 4, 5, 6)),
    "2d-dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, dilation=2), (2, 4, 5, 6)),
    "3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (1, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolution_is_bitwise(case: str) -> None:
    make, shape = TRANSPOSED[case]
    module, inputs = make(), (_randn(*shape),)
    expected = _run(module, inputs)
    lpcompile(module, "fp32-emulated", strict=True)
    assert _same(_run(module, inputs), expected)
    assert run_state(module).gemm_calls == 1


def test_transposed_convolution_by_a_policy() -> None:
    module, x = nn.ConvTranspose2d(4, 6, 3, stride=2), _randn(2, 4, 5, 5)
    wanted = F.conv_transpose2d(x.bfloat16().float(), module.weight.bfloat16().float(), module.bias, 2)
    lpcompile(module, _policy("conv_transpose2d", format="bf16"), strict=True)
    torch.testing.assert_close(module(x), wanted, rtol=1e-6, atol=1e-6)
    assert {row.op for row in report(module).gemms} == {"conv_transpose2d"}


def test_functional_transposed_convolution() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(_randn(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose2d(x, self.weight, stride=2, output_padding=1, groups=2)

    module, inputs = Functional(), (_randn(2, 4, 5, 5),)
    expected = _run(module, inputs)
    lpcompile(module, "fp32-emulated", inputs, strict=True)
    assert {row.name for row in report(module).gemms} == {"conv_transpose2d_0"}
    assert _same(_run(module, inputs), expected)
    assert run_state(module).gemm_calls == 1


def test_an_output_size_is_taken() -> None:
    module, x = nn.ConvTranspose2d(4, 6, 3, stride=2), _randn(2, 4, 5, 5)
    expected = [module(x, output_size=[size, size]) for size in (11, 12)]
    lpcompile(module, "fp32-emulated", strict=True)
    for size, wanted in zip((11, 12), expected):
        assert torch.equal(module(x, output_size=[size, size]), wanted)


PADDED: dict[str, Callable[[], nn.Module]] = {
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "same-one-side": lambda: nn.Conv2d(4, 6, (2, 3), padding="same"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "replicate-same": lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", PADDED)
def test_padding_of_every_kind_is_bitwise(case: str) -> None:
    module, inputs = PADDED[case](), (_randn(2, 4, 7, 8),)
    expected = _run(module, inputs)
    lpcompile(module, "fp32-emulated", strict=True)
    assert _same(_run(module, inputs), expected)
    assert run_state(module).gemm_calls == 1


# Attention

_Q, _K, _V = _randn(3, 5, 16), _randn(3, 6, 16), _randn(3, 6, 16) + 1
_PADDING = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]], dtype=torch.bool)
_SELF_PADDING = _PADDING[:, :5]
_CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)

ATTENTION: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "self": ({}, (_Q, _Q, _Q), {}),
    "self-padded": ({}, (_Q, _Q, _Q), {"key_padding_mask": _SELF_PADDING}),
    "causal": ({}, (_Q, _Q, _Q), {"attn_mask": _CAUSAL, "is_causal": True}),
    "causal-padded": ({}, (_Q, _Q, _Q), {"attn_mask": _CAUSAL, "key_padding_mask": _SELF_PADDING}),
    "float-mask": ({}, (_Q, _K, _K), {"attn_mask": _randn(5, 6)}),
    "mask-per-head": ({}, (_Q, _K, _K), {"attn_mask": _randn(12, 5, 6), "key_padding_mask": _PADDING}),
    "per-head-weights": ({}, (_Q, _K, _K), {"average_attn_weights": False}),
    "encoder-decoder": ({}, (_Q, _K, _K), {"key_padding_mask": _PADDING}),
    "three-inputs": ({}, (_Q, _K, _V), {}),
    "no-bias": ({"bias": False}, (_Q, _K, _V), {}),
    "no-bias-shared-keys": ({"bias": False}, (_Q, _K, _K), {}),
    "bias-kv": ({"add_bias_kv": True}, (_Q, _Q, _Q), {"attn_mask": _CAUSAL, "key_padding_mask": _SELF_PADDING}),
    "zero-attention": ({"add_zero_attn": True}, (_Q, _K, _V), {"key_padding_mask": _PADDING}),
    "other-widths": ({"kdim": 8, "vdim": 12}, (_Q, _K[..., :8].contiguous(), _V[..., :12].contiguous()), {}),
    "dropout": ({"dropout": 0.3}, (_Q, _K, _K), {}),
    "unbatched": ({}, (_Q[0], _K[0], _K[0]), {}),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("is_fused", [True, False])
def test_multihead_attention_is_bitwise(
    case: str, batch_first: bool, need_weights: bool, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch runs it; and the operations that stand for its fused attention where a product of it rounds, as its math
    backend runs them.
    """
    if not is_fused:
        monkeypatch.setattr(multihead_attention, "Product", ())  # no product is known to be an identity
    options, inputs, call = ATTENTION[case]
    if not batch_first and inputs[0].dim() == 3:
        swapped = {id(x): x.transpose(0, 1).contiguous() for x in inputs}
        inputs = tuple(swapped[id(x)] for x in inputs)
    module = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options)
    with nullcontext() if is_fused else sdpa_kernel(SDPBackend.MATH):
        expected = _run(module, inputs, need_weights=need_weights, **call)
    lpcompile(module, "fp32-emulated", strict=True)
    assert {row.name for row in report(module).gemms} == {"in_proj", "qk", "pv", "out_proj"}
    assert _same(_run(module, inputs, need_weights=need_weights, **call), expected)
    num_projections = len({id(x) for x in inputs})
    assert run_state(module).gemm_calls == num_projections + 3
    restore(module)
    with nullcontext() if is_fused else sdpa_kernel(SDPBackend.MATH):
        assert _same(_run(module, inputs, need_weights=need_weights, **call), expected)


@pytest.mark.parametrize("part", ["in_proj", "qk", "pv", "out_proj"])
def test_each_product_of_attention_has_its_own_rule(part: str) -> None:
    module, inputs = nn.MultiheadAttention(16, 4), (_Q, _Q, _Q)
    exact = module(*inputs)[0]
    rules = [{"match": {"name": f"*{part}"}, "fwd": {"x": "e4m3", "w": "e4m3"}}]
    lpcompile(module, Policy.model_validate({"version": 1, "name": "p", "rules": rules}), strict=True)
    assert {row.name for row in report(module).gemms} == {part}
    y = module(*inputs)[0]
    assert run_state(module).gemm_calls == 1
    assert not torch.equal(y, exact)
    torch.testing.assert_close(y, exact, rtol=0, atol=0.1)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_composite_leaves_compute_the_same(clone: Callable[[nn.Module], nn.Module]) -> None:
    module = lpcompile(nn.MultiheadAttention(16, 4), "bf16", strict=True)
    twin = clone(module)
    assert _same(_run(twin, (_Q, _Q, _Q)), _run(module, (_Q, _Q, _Q)))
    assert run_state(twin).gemm_calls == run_state(module).gemm_calls > 0


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("policy", ["int8", "fp32"])
def test_the_encoders_fast_path_is_closed_while_compiled(policy: str, masked: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    options = {"src_key_padding_mask": _SELF_PADDING} if masked else {}
    with torch.no_grad():
        expected = model(_Q, **options)
        lpcompile(model, policy)
        y = model(_Q, **options)
        calls = run_state(model).gemm_calls
        restore(model)
        assert torch.equal(model(_Q, **options), expected)
    kept = ~_SELF_PADDING if masked else torch.ones_like(_SELF_PADDING)
    if policy == "fp32":
        assert torch.equal(y, expected)
        assert calls == 0
    else:
        assert calls == 2 * 4  # in_proj, out_proj and two linears per layer; int8 names no products of activations
        assert not torch.equal(y[kept], expected[kept])
        torch.testing.assert_close(y[kept], expected[kept], rtol=0, atol=0.1)


# Recurrences

RECURRENT: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm-deep": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm-projected": (nn.LSTM, {"num_layers": 2, "proj_size": 3, "bidirectional": True}),
    "lstm-no-bias": (nn.LSTM, {"bias": False}),
    "gru": (nn.GRU, {}),
    "gru-deep": (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "rnn-tanh": (nn.RNN, {"num_layers": 2}),
    "rnn-relu": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("case", RECURRENT)
def test_recurrences_are_within_a_few_ulp(case: str, batched: bool, given: bool) -> None:
    """torch's fused kernels sum in another order; 2e-6 is 16 ulp of the states, which lie between -1 and 1."""
    kind, options = RECURRENT[case]
    module = kind(8, 6, **options)
    inputs: tuple[Any, ...] = (_randn(7, 3, 8) if batched else _randn(7, 8),)
    if given:
        batch = inputs[0].shape[0 if options.get("batch_first") else 1]
        layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        sizes = [options.get("proj_size") or 6, 6] if kind is nn.LSTM else [6]
        states = tuple(_randn(layers, *((batch,) if batched else ()), size) for size in sizes)
        inputs += (states if kind is nn.LSTM else states[0],)
    expected = _run(module, inputs)
    lpcompile(module, "fp32-emulated", strict=True)
    for found, wanted in zip(_run(module, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    sites = {row.name for row in report(module).gemms}
    assert sites == {name.removeprefix("weight_") for name, _ in module.named_parameters() if "weight" in name}
    assert run_state(module).gemm_calls > len(sites)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("batched", [True, False])
def test_cells(kind: Callable[..., nn.Module], batched: bool) -> None:
    module, inputs = kind(8, 6), (_randn(3, 8) if batched else _randn(8),)
    expected = _run(module, inputs)
    lpcompile(module, "fp32-emulated", strict=True)
    for found, wanted in zip(_run(module, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    assert run_state(module).gemm_calls == 2


def test_dropout_between_layers_draws_torchs_mask() -> None:
    module, inputs = nn.LSTM(8, 6, num_layers=2, dropout=0.5), (_randn(7, 3, 8),)
    expected = _run(module, inputs)
    lpcompile(module, "fp32-emulated", strict=True)
    for found, wanted in zip(_run(module, inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_a_recurrence_in_low_precision_is_near_and_not_equal() -> None:
    module, x = nn.LSTM(8, 6), _randn(7, 3, 8)
    exact = module(x)[0]
    lpcompile(module, _policy("linear", format="e4m3"), strict=True)
    assert not torch.equal(module(x)[0], exact)
    torch.testing.assert_close(module(x)[0], exact, rtol=0, atol=0.1)


def test_a_packed_sequence_is_refused_aloud() -> None:
    module = lpcompile(nn.GRU(8, 6), "fp32-emulated")
    packed = nn.utils.rnn.pack_padded_sequence(_randn(7, 3, 8), torch.tensor([7, 5, 2]))
    with pytest.raises(LpError, match="pad_packed_sequence"):
        module(packed)


def test_stochastic_rounding_draws_anew_at_every_time_step() -> None:
    module = lpcompile(nn.RNN(8, 6, nonlinearity="relu"), _policy("linear", format="e4m3", rounding="stochastic"))
    assert all(row.runs_as_policy_says for row in report(module).gemms)
    nn.init.zeros_(module.weight_ih_l0)
    nn.init.constant_(module.bias_ih_l0, 0.3)  # the same input at every step, and a state that settles where it began
    nn.init.zeros_(module.bias_hh_l0)
    module.weight_hh_l0.data = 0.07 * torch.eye(6)
    steps, _ = module(torch.zeros(12, 1, 8))
    assert len({tuple(step.flatten().tolist()) for step in steps[6:]}) > 3


def _lstm(*shape: int) -> tuple[Tensor, Tensor]:
    return _randn(*shape), _randn(*shape)


def _attention() -> nn.Module:
    return nn.MultiheadAttention(16, 4)


WRONG_ARGUMENTS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "lstm: batch of the state": (lambda: nn.LSTM(8, 6), (_randn(7, 3, 8), _lstm(1, 1, 6)), {}),
    "lstm: layers of the state": (lambda: nn.LSTM(8, 6), (_randn(7, 3, 8), _lstm(2, 3, 6)), {}),
    "lstm: size of the state": (lambda: nn.LSTM(8, 6), (_randn(7, 3, 8), (_randn(1, 3, 6), _randn(1, 3, 1))), {}),
    "lstm: dims of the state": (lambda: nn.LSTM(8, 6), (_randn(7, 3, 8), _lstm(3, 6)), {}),
    "lstm: unbatched, dims of the state": (lambda: nn.LSTM(8, 6), (_randn(7, 8), _lstm(1, 1, 6)), {}),
    "lstm: dims of the input": (lambda: nn.LSTM(8, 6), (_randn(1, 7, 3, 8),), {}),
    "lstm: size of the input": (lambda: nn.LSTM(8, 6), (_randn(7, 3, 9),), {}),
    "lstm: dtype of the input": (lambda: nn.LSTM(8, 6), (_randn(7, 3, 8).double(),), {}),
    "gru: batch of the state": (lambda: nn.GRU(8, 6, batch_first=True), (_randn(7, 3, 8), _randn(1, 1, 6)), {}),
    "rnn: batch of the state": (lambda: nn.RNN(8, 6), (_randn(7, 3, 8), _randn(1, 1, 6)), {}),
    "rnn: dims of the state": (lambda: nn.RNN(8, 6), (_randn(7, 8), _randn(1, 1, 6)), {}),
    "lstm cell: batch of the state": (lambda: nn.LSTMCell(8, 6), (_randn(3, 8), _lstm(1, 6)), {}),
    "lstm cell: dims of the input": (lambda: nn.LSTMCell(8, 6), (_randn(2, 3, 8),), {}),
    "gru cell: batch of the state": (lambda: nn.GRUCell(8, 6), (_randn(3, 8), _randn(1, 6)), {}),
    "rnn cell: dims of the state": (lambda: nn.RNNCell(8, 6), (_randn(3, 8), _randn(1, 3, 6)), {}),
    "rnn cell: size of the state": (lambda: nn.RNNCell(8, 6), (_randn(3, 8), _randn(3, 1)), {}),
    "mha: mask for one query": (_attention, (_Q, _Q, _Q), {"attn_mask": torch.zeros(1, 3)}),
    "mha: mask for one key": (_attention, (_Q, _Q, _Q), {"attn_mask": torch.zeros(3, 1)}),
    "mha: mask for one head": (_attention, (_Q, _Q, _Q), {"attn_mask": torch.zeros(1, 3, 3)}),
    "mha: mask of four dims": (_attention, (_Q, _Q, _Q), {"attn_mask": torch.zeros(1, 1, 3, 3)}),
    "mha: mask of integers": (_attention, (_Q, _Q, _Q), {"attn_mask": torch.zeros(3, 3).long()}),
    "mha: padding of one key": (
        _attention, (_Q, _Q, _Q), {"key_padding_mask": torch.zeros(5, 1).bool()},
    ),
    "mha: padding of one sample": (
        _attention, (_Q, _Q, _Q), {"key_padding_mask": torch.zeros(1, 3).bool()},
    ),
    "mha: batch of the keys": (_attention, (_Q, _K[:, :1], _K[:, :1]), {}),
    "mha: width of the query": (_attention, (_Q[..., :8], _Q[..., :8], _Q[..., :8]), {}),
    "mha: values of another length": (_attention, (_Q, _K, _K[:2]), {}),
    "mha: keys without a batch": (_attention, (_Q, _K[0], _K[0]), {}),
    "mha: causal without a mask": (_attention, (_Q, _Q, _Q), {"is_causal": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_what_torch_refuses_a_compiled_leaf_refuses(case: str) -> None:
    """With an error of the same kind, and never by broadcasting."""
    make, inputs, options = WRONG_ARGUMENTS[case]
    module = make()
    with pytest.raises((RuntimeError, ValueError, AssertionError)) as torchs:
        module(*inputs, **options)
    lpcompile(module, "bf16")
    with pytest.raises(torchs.type):
        module(*inputs, **options)


# Mixture of experts


def _experts(implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
    config._experts_implementation = implementation
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return module


class _Choosing(nn.Module):
    """Experts with a fixed choice; expert 3 gets no token."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.experts = _experts(implementation)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        chosen = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [2, 1]])
        return self.experts(x, chosen, weights)


@pytest.mark.parametrize("with_examples", [True, False])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_experts_are_reached_whatever_their_implementation(implementation: str, with_examples: bool) -> None:
    module, inputs = _Choosing(implementation), (_randn(5, 16), _randn(5, 2))
    expected = _run(module, inputs)
    lpcompile(module, "fp32-emulated", inputs if with_examples else None, strict=True)
    assert {row.name for row in report(module).gemms} == {"experts.gate_up_proj", "experts.down_proj"}
    found = _run(module, inputs)
    assert _same(found, expected)
    assert all(row.calls == row.calls_as_said > 0 for row in report(module).gemms if row.role == "fwd")


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("policy", ["fp8-rowwise", "int8"])
def test_experts_have_the_same_bits_in_every_implementation(implementation: str, policy: str) -> None:
    """One product per expert in each: what differs is the order in which a token's two experts are added."""
    inputs = _randn(5, 16), _randn(5, 2)
    wanted = _run(lpcompile(_Choosing("grouped_mm"), policy), inputs)
    for value, other in zip(_run(lpcompile(_Choosing(implementation), policy), inputs), wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_transposed_experts_with_biases_are_bitwise(implementation: str) -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
    config._experts_implementation = implementation
    original = GptOssExperts(config)
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    chosen, x, weights = torch.tensor([[0, 1], [1, 2], [2, 0]]), _randn(3, 16), _randn(3, 2)
    exact, near = (lpcompile(copy.deepcopy(original), policy) for policy in ("fp32-emulated", "fp8-rowwise"))
    results = []
    for module in (original, exact, near):
        y = module(x, chosen, weights)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))))
    assert _same(results[1], results[0])
    assert all(F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99 for a, b in zip(results[2], results[0]))
    assert not torch.equal(results[2][0], results[0][0])


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_of_one_rank_of_several_run_with_rows_of_no_expert(implementation: str) -> None:
    original = _experts(implementation)
    original._is_expert_parallel = True
    exact, near = (lpcompile(copy.deepcopy(original), policy) for policy in ("fp32-emulated", "fp8-rowwise"))
    chosen, weights = torch.tensor([[0, 4], [4, 4], [2, 0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]])
    x = _randn(3, 16)
    wanted = original(x, chosen, weights)
    assert torch.equal(exact(x, chosen, weights), wanted)
    torch.testing.assert_close(near(x, chosen, weights), wanted, rtol=0.2, atol=0.02)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_run_in_eager_code_where_a_graph_is_made_of_the_rest(implementation: str) -> None:
    inputs = _randn(5, 16), _randn(5, 2)
    model = lpcompile(_Choosing(implementation), "int8")
    wanted = model(*inputs)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(*inputs), wanted)
    assert [row.counts for row in report(model).gemms if row.role == "fwd"] == [
        f"{2 * (3 if implementation == 'eager' else 4)} of {2 * (3 if implementation == 'eager' else 4)} calls"
    ] * 2


def test_experts_call_the_function_that_the_model_would_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    called = []

    def mock(module: nn.Module, *args: Any) -> Tensor:
        called.append(module)
        return batched_mm_experts_forward(module, *args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "grouped_mm", mock)
    module = lpcompile(_Choosing("grouped_mm"), "int8")
    module(_randn(5, 16), _randn(5, 2))
    assert called == [module.experts]
    assert [row.counts for row in report(module).gemms if row.role == "fwd"] == ["4 of 4 calls"] * 2


class _Multiply(torch.autograd.Function):
    """A product with a gradient of its own, as ZeRO-3 has it for F.linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return dy @ w, dy.mT @ x


def test_products_of_experts_in_a_function_with_its_own_gradient_are_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def own(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate, up = _Multiply.apply(x, module.gate_up_proj[0]).chunk(2, -1)
        return F.linear(gate * up, module.down_proj[0])

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "own", own)
    module, inputs = lpcompile(_Choosing("own"), "int8"), (_randn(5, 16), _randn(5, 2))
    with pytest.warns(LoweringWarning, match="nothing sees the implementation own multiply by gate_up_proj"):
        module(*inputs)
    assert [row.counts for row in report(module).gemms if row.role == "fwd"] == ["0 of 1 calls", "1 of 1 calls"]


@pytest.mark.parametrize("strict", [False, True])
def test_experts_whose_products_nothing_sees_are_told(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def fused(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return x * module.down_proj.sum() + module.gate_up_proj.sum()

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "fused", fused)
    module, inputs = lpcompile(_Choosing("fused"), "int8", strict=strict), (_randn(5, 16), _randn(5, 2))
    if strict:
        with pytest.raises(LoweringError, match=r"experts.gate_up_proj.*the implementation fused"):
            module(*inputs)
        return
    with pytest.warns(LoweringWarning, match="nothing sees the implementation fused multiply by"):
        module(*inputs)
    rows = [row for row in report(module).gemms if row.role == "fwd"]
    assert [row.counts for row in rows] == ["0 of 1 calls"] * 2
    assert not any(row.runs_as_policy_says for row in rows)


def test_experts_in_low_precision_are_near_and_not_equal() -> None:
    module, inputs = _Choosing("grouped_mm"), (_randn(5, 16), _randn(5, 2))
    exact = module(*inputs)
    lpcompile(module, "int8", strict=False)
    assert all(row.runs_as_policy_says for row in report(module).gemms)
    y = module(*inputs)
    assert not torch.equal(y, exact)
    assert F.cosine_similarity(y.flatten(), exact.flatten(), dim=0) > 0.999


def test_a_leaf_refuses_the_arguments_that_torchs_refuses() -> None:
    x = torch.randn(2, 4)
    original, model = nn.Linear(4, 3), lpcompile(nn.Sequential(nn.Linear(4, 3)), "hfp8")[0]
    for args, kwargs in (((), {"bogus": x}), ((x,), {"bogus": x}), ((x, x), {}), ((), {}), ((x,), {"input": x})):
        for leaf in (original, model):
            with pytest.raises(TypeError, match="forward"):
                leaf(*args, **kwargs)
    assert torch.equal(model(input=x), model(x))

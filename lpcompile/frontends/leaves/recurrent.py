"""nn.RNN, nn.LSTM, nn.GRU and their cells with their products by name: ih_l0, hh_l0 (hr_l0), ..., as their weights.

    LSTM   i, f, g, o = W_ih x + b_ih + W_hh h + b_hh     c' = sigmoid(f) c + sigmoid(i) tanh(g)
                                                          h' = sigmoid(o) tanh(c'), projected by W_hr if there is one
    GRU    r, z = sigmoid(..)  n = tanh(W_in x + b_in + r (W_hn h + b_hn))        h' = (1 - z) n + z h
    RNN    h' = tanh or relu (W_ih x + b_ih + W_hh h + b_hh)

W_ih x is one product over all time steps, W_hh h one per step. torch's fused kernels sum in another order: results are
within a few ulp of fp32 and not bitwise equal. Weights as torch.nn.RNNBase has them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile.errors import NotSupported
from runtime.ops.layer import result_dtype

Products = Mapping[str, Callable[..., Tensor]]


def recurrent(module: nn.RNNBase, products: Products, input: Any, hx: Any = None) -> tuple[Any, Any]:
    """Arguments and results of the forward of nn.RNN, nn.LSTM and nn.GRU; NotSupported for a PackedSequence."""
    if not isinstance(input, Tensor):
        raise NotSupported(
            f"a compiled {type(module).__name__} takes no {type(input).__name__}",
            where="lpcompile",
            expected="a tensor, padded",
            hint="pad_packed_sequence, or a policy that does not name this module",
        )
    if input.dim() not in (2, 3):
        raise ValueError(f"{type(module).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    is_batched, is_lstm = input.dim() == 3, isinstance(module, nn.LSTM)
    if not isinstance(module, nn.GRU):  # of which torch keeps the state as it is
        input = input.to(result_dtype(input))  # under autocast all of it runs in one dtype, as torch's does
    x = input if is_batched else input.unsqueeze(1)
    x = x.transpose(0, 1) if is_batched and module.batch_first else x
    directions = 2 if module.bidirectional else 1
    states = _initial_states(module, x, hx, is_batched, directions)
    check: Any = module.check_forward_args  # torch's errors for sizes that would broadcast
    check(x.transpose(0, 1) if module.batch_first else x, states if is_lstm else states[0], None)
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            first = tuple(state[layer * directions + direction] for state in states)
            y, final = _run_layer(module, products, x, first, suffix, is_reverse=bool(direction))
            outputs.append(y)
            finals.append(final)
        x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        if module.dropout and module.training and layer < module.num_layers - 1:
            x = F.dropout(x, module.dropout, True)
    last = tuple(torch.stack(parts) for parts in zip(*finals))
    if not is_batched:
        x, last = x.squeeze(1), tuple(part.squeeze(1) for part in last)
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, (last if is_lstm else last[0])


def recurrent_cell(module: nn.RNNCellBase, products: Products, input: Tensor, hx: Any = None) -> Any:
    """Arguments and results of the forward of nn.RNNCell, nn.LSTMCell and nn.GRUCell."""
    is_batched, is_lstm = input.dim() == 2, isinstance(module, nn.LSTMCell)
    given = () if hx is None else hx if is_lstm else (hx,)
    for name, tensor in (("input", input), *(("hx", part) for part in given)):
        if tensor.dim() not in (1, 2):
            kind = type(module).__name__
            raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
    x = input if is_batched else input.unsqueeze(0)
    zeros = x.new_zeros(x.shape[0], module.hidden_size)
    state = (zeros, zeros)[: 1 + is_lstm] if hx is None else tuple(s if is_batched else s.unsqueeze(0) for s in given)
    for part in state:
        if part.shape != zeros.shape:
            raise RuntimeError(f"hidden has the size {tuple(part.shape)}, where {tuple(zeros.shape)} is expected")
    gates = products["ih"](x, module.weight_ih, module.bias_ih)
    state = _step_of(module)(gates, products["hh"](state[0], module.weight_hh, module.bias_hh), state)
    state = state if is_batched else tuple(part.squeeze(0) for part in state)
    return state if is_lstm else state[0]


def _initial_states(module: nn.RNNBase, x: Tensor, hx: Any, is_batched: bool, directions: int) -> tuple[Tensor, ...]:
    """h, and c of an LSTM, each (layers x directions, batch, size)."""
    if hx is not None:
        given = hx if isinstance(module, nn.LSTM) else (hx,)
        if any(state.dim() != 2 + is_batched for state in given):
            dims = ", ".join(f"{state.dim()}-D" for state in given)
            raise RuntimeError(f"For {2 + is_batched}-D input, hx should also be {2 + is_batched}-D but got {dims}")
        return tuple((state if is_batched else state.unsqueeze(1)).to(x.dtype) for state in given)
    sizes = [module.proj_size or module.hidden_size, *([module.hidden_size] if isinstance(module, nn.LSTM) else [])]
    return tuple(x.new_zeros(module.num_layers * directions, x.shape[1], size) for size in sizes)


def recurrent_like(module: Any, input: Tensor) -> tuple[Any, Any]:
    """Tensors of the sizes and dtypes that the forward gives for `input`, which is padded, whatever the values."""
    size, directions = module.proj_size or module.hidden_size, 1 + module.bidirectional
    batch = () if input.dim() == 2 else (input.shape[0 if module.batch_first else 1],)
    y = input.new_empty(*input.shape[:-1], size * directions)
    h = input.new_empty(module.num_layers * directions, *batch, size)
    if not isinstance(module, nn.LSTM):
        return y, h
    return y, (h, input.new_empty(module.num_layers * directions, *batch, module.hidden_size))


def _run_layer(
    module: nn.RNNBase, products: Products, x: Tensor, state: tuple[Tensor, ...], suffix: str, is_reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction: (time, batch, size) -> the same, and its last state."""
    weights = {name: getattr(module, f"{name}{suffix}", None) for name in _WEIGHTS}
    step = _step_of(module)
    steps = products[f"ih{suffix}"](x, weights["weight_ih"], weights["bias_ih"]).unbind(0)
    outputs = []
    for gates in reversed(steps) if is_reverse else steps:
        hidden = products[f"hh{suffix}"](state[0], weights["weight_hh"], weights["bias_hh"])
        state = step(gates, hidden, state)
        if weights["weight_hr"] is not None:
            state = (products[f"hr{suffix}"](state[0], weights["weight_hr"], None), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if is_reverse else outputs), state


_Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _lstm_step(gates: Tensor, hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (gates + hidden).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(gates: Tensor, hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = gates.chunk(3, -1), hidden.chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return ((state[0] - n) * z + n,)


def _tanh_step(gates: Tensor, hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((gates + hidden).tanh(),)


def _relu_step(gates: Tensor, hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((gates + hidden).relu(),)


def _step_of(module: Any) -> _Step:
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return _lstm_step
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return _gru_step
    return _tanh_step if module.nonlinearity == "tanh" else _relu_step


_WEIGHTS = ("weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr")

"""Free axes: along which axis of an operand a scale may vary and still come out of the sum.

    y = sum_k (s_m q_mk)(t_n r_nk) = s_m t_n sum_k q_mk r_nk

The axes are those of the operand's matrix view in memory, row for one scale per row. An output channel of a
convolution's weight is a channel of y; of a transposed convolution's no dim of the weight is one.
"""

from typing import Literal

from runtime.numerics.specs import Role

Axis = Literal["row", "column", "channel", "none"]
Side = Literal["lhs", "rhs"]
_LINEAR: dict[tuple[Role, Side], Axis] = {
    ("fwd", "lhs"): "row",
    ("fwd", "rhs"): "row",
    ("bwd", "lhs"): "row",
    ("bwd", "rhs"): "column",
    ("grad", "lhs"): "column",
    ("grad", "rhs"): "column",
}
_MATMUL: dict[tuple[Role, Side], Axis] = {**_LINEAR, ("fwd", "rhs"): "column", ("bwd", "rhs"): "row"}
_NONE: dict[tuple[Role, Side], Axis] = dict.fromkeys(_LINEAR, "none")
FREE_AXES: dict[str, dict[tuple[Role, Side], Axis]] = {
    "linear": _LINEAR,
    "linear_kn": _MATMUL,
    "matmul": _MATMUL,
    "conv": {**_NONE, ("fwd", "rhs"): "channel"},
    "conv_transposed": _NONE,
}
"""By kind of layer, role and side."""

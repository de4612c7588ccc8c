"""Owners: what the quantizers with state of a site are called.

    SITE.x   SITE.w   SITE.dy              what FWD casts, and the gradient
    SITE.x_grad  SITE.w_bwd  SITE.dy_grad  where GRAD casts x, BWD w, GRAD dy in another way than the role before it

Operands of a product of activations are x and w too. An operand that two roles cast alike has one state.
"""

from runtime.numerics.free_axes import Side
from runtime.numerics.specs import ROLES, LayerSpec, QuantSpec, Role

OPERANDS = ("x", "w", "dy", "x_grad", "w_bwd", "dy_grad")


def owner_of(site: str, operand: str) -> str:
    """The name of the quantizer of one of OPERANDS; without a dot for the root's."""
    return f"{site}.{operand}".removeprefix(".")


def operand_of(layer: LayerSpec, role: Role, side: Side) -> str:
    """Which of OPERANDS a role reads on a side."""
    if role == "fwd":
        return "x" if side == "lhs" else "w"
    if role == "bwd":
        return "dy" if side == "lhs" else "w" if layer.bwd.rhs == layer.fwd.rhs else "w_bwd"
    if side == "lhs":
        return "dy" if layer.grad.lhs == layer.bwd.lhs else "dy_grad"
    return "x" if layer.grad.rhs == layer.fwd.lhs else "x_grad"


def quantizers_in(layer: LayerSpec) -> dict[str, QuantSpec]:
    """What of a site is cast by a quantizer with state, by operand."""
    sides: tuple[Side, Side] = ("lhs", "rhs")
    found = {}
    for role in ROLES:
        for side in sides:
            spec: QuantSpec = getattr(layer.role(role), side)
            if spec.quantizer is not None:
                found[operand_of(layer, role, side)] = spec
    return found

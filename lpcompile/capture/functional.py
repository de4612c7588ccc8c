"""Which nodes of a graph are GEMMs that no module owns, and what are they called?"""

from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True)
class FunctionalGemm:
    """A GEMM written as an operation: `name` is its op and its number among those of that op, in program order."""

    name: str
    op: str
    node: fx.Node


def functional_gemms(graph: fx.Graph) -> list[FunctionalGemm]:
    """The functional GEMMs of a graph in order of appearance: matmul_0, matmul_1, sdpa_0, ..."""
    counts: dict[str, int] = {}
    found: list[FunctionalGemm] = []
    for node in graph.nodes:
        op = GEMM_OPS.get(op_name(node)) if node.op in ("call_function", "call_method") else None
        if op is None:
            continue
        number = counts.setdefault(op, 0)
        counts[op] = number + 1
        found.append(FunctionalGemm(f"{op}_{number}", op, node))
    return found


def op_name(node: fx.Node) -> str:
    """The operation of a node without namespace, overload and dunders: `__matmul__`, `mm.default` -> matmul, mm."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name.removeprefix("__").removesuffix("__")


GEMM_OPS = {
    "matmul": "matmul",
    "mm": "mm",
    "bmm": "bmm",
    "addmm": "addmm",
    "addmm_": "addmm",
    "baddbmm": "baddbmm",
    "baddbmm_": "baddbmm",
    "einsum": "einsum",
    "linear": "linear",
    "conv1d": "conv1d",
    "conv2d": "conv2d",
    "conv3d": "conv3d",
    "conv_transpose1d": "conv_transpose1d",
    "conv_transpose2d": "conv_transpose2d",
    "conv_transpose3d": "conv_transpose3d",
    "scaled_dot_product_attention": "sdpa",
}
"""Operation -> the op a policy names it by."""

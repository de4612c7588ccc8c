"""Leaf types: what is known of the tensors in a leaf's graph, which nobody recorded, for the text form and shape rules.

Weights say their own shape. The input's is that of the first recorded call, as the numbers in every recorded graph are.
"""

from collections.abc import Iterable

from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from passes.ir.program import Unit, child_path
from passes.ir.types import META, tensor_meta
from runtime.ops.types import DTYPE_NAMES, TensorType


def note_leaf_types(units: Iterable[Unit], modules: dict[str, nn.Module]) -> None:
    """Write `tensor_meta` into the graphs of leaves. A weight that is partitioned away (ZeRO-3) says nothing, nor does
    one that is computed when it is read: computing it may change the module (a step of spectral_norm's iteration).
    """
    units = list(units)
    inputs = _inputs(units)
    for unit in units:
        if unit.kind != "leaf":
            continue
        for node in unit.graph.nodes:
            module = modules.get(unit.path)
            if node.op == "get_attr" and module is not None and not is_parametrized(module, node.target):
                _note(node, getattr(module, node.target, None))
        first = next(iter(unit.graph.nodes))
        if unit.path in inputs:
            first.meta[META] = inputs[unit.path]


def _inputs(units: list[Unit]) -> dict[str, object]:
    """Path of a leaf that is called with one tensor -> what the recorder saw of it."""
    found: dict[str, object] = {}
    for unit in units:
        for node in unit.graph.nodes if unit.kind == "module" else ():
            if node.op == "call_module" and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
                path = child_path(unit.path, node)
                if META in node.args[0].meta:
                    found.setdefault(path, node.args[0].meta[META])
    return found


def _note(node: fx.Node, value: object) -> None:
    if isinstance(value, Tensor) and value.numel() and value.dtype in DTYPE_NAMES:
        node.meta[META] = tensor_meta(TensorType(tuple(value.shape), value.dtype))

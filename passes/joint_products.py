"""Joint products: which nodes of a joint graph (forward and backward, in aten operations) are the FWD, BWD and GRAD of
which site.

    mm, addmm, bmm, convolution                  FWD: the site is what capture stamped on the node, `meta["custom"]`
    mm, bmm, convolution_backward                BWD or GRAD of the FWD that autograd made it for (`seq_nr`)

BWD and GRAD are told apart by where their operands come from: BWD reads FWD's rhs, GRAD its lhs; the other one is dy.
A product may stand transposed: `(w^T dy^T)` for `dy w`. `Product.is_transposed` says so.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from passes.ir.gemm_nodes import GemmNode, Unreadable
from runtime.ops.contractions import ConvGeometry
from runtime.ops.plan import print_geometry

SITE_KEY = "lp_site"
"""Key of `node.meta["custom"]`: the name of the leaf whose forward made the node."""
ROOT_KEY = "lp_root"
"""Key of `node.meta["custom"]`: there where the model is one graph, which no other module of its class shares."""
UNNAMED = "?"
"""The name of a product whose module is not known."""

aten: Any = torch.ops.aten
_MATRIX = (aten.mm.default, aten.addmm.default, aten.bmm.default)
_CONV, _CONV_BACKWARD = aten.convolution.default, aten.convolution_backward.default
_FUSED = Unreadable("matmul", "fused attention holds its products in one op; use the model's eager attention")
_TRANSPOSES = {aten.permute.default, aten.t.default, aten.transpose.int}


@dataclass
class Product:
    """One multiplication of a backward graph: BWD (dy with FWD's rhs) or GRAD (dy with FWD's lhs)."""

    node: fx.Node
    dy: fx.Node
    is_dy_transposed: bool
    """Whether `dy` is transposed against y."""
    is_transposed: bool
    """Whether the node's result is transposed against dx, or against dw as it lies in FWD's rhs."""


@dataclass
class JointSite:
    """One GEMM site of a joint graph. `gemm` is FWD as passes read it: lhs and rhs in the layout that has a kind."""

    name: str
    gemm: GemmNode | Unreadable
    fwd: fx.Node
    bwd: Product | None = None
    grad: Product | None = None
    conv_backward: fx.Node | None = None
    """The node that holds BWD and GRAD of a convolution."""
    stray: list[fx.Node] = field(default_factory=list)
    """Products that autograd made for this site and that read neither of its operands."""


def find_joint_sites(graph: fx.Graph, name: "NameProducts") -> list[JointSite]:
    """The sites of a joint graph, or of a graph without backward, in the order of the forward."""
    by_number: dict[Any, list[JointSite]] = defaultdict(list)
    sites = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if _is_attention(node) and not _is_backward(node):
            base = name(node, "sdpa")
            sites += [JointSite(base + part, _FUSED, node) for part in (".qk", ".pv")]
        elif node.target in (*_MATRIX, _CONV) and not _is_backward(node):
            site = JointSite(name(node), _read(node), node)
            sites.append(site)
            by_number[node.meta.get("seq_nr")].append(site)
        elif node.target in (*_MATRIX, _CONV_BACKWARD) and _is_backward(node):
            for site in by_number.get(node.meta.get("seq_nr"), ()):
                _attribute(site, node)
    return sites


class NameProducts:
    """Names of products that a module writes as operations: `PATH.matmul_0`, counted per module in program order.
    `paths` maps what torch.compile knows a module by, its id as text, to its path.
    """

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = paths
        self._counts: Counter[str] = Counter()

    def __call__(self, node: fx.Node, stem: str = "matmul") -> str:
        custom = node.meta.get("custom") or {}
        if SITE_KEY in custom:
            return str(custom[SITE_KEY])
        modules = list(node.meta.get("nn_module_stack") or ())
        path = self._paths.get(modules[-1]) if modules else ""  # the model itself is not listed
        if ROOT_KEY not in custom or path is None:
            return UNNAMED
        name = f"{path}.{stem}" if path else stem
        number = self._counts[name]
        self._counts[name] += 1
        return f"{name}_{number}"


def _is_attention(node: fx.Node) -> bool:
    name = str(node.target)
    return "scaled_dot_product" in name and "backward" not in name


def _is_backward(node: fx.Node) -> bool:
    return bool(node.meta.get("autograd_backward")) or node.meta.get("partitioner_tag") == "is_backward"


def _read(node: fx.Node) -> GemmNode | Unreadable:
    if node.target is _CONV:
        x, w, bias, stride, padding, dilation, is_transposed, more, groups = node.args
        op = f"conv{'_transpose' if is_transposed else ''}{len(stride)}d"  # type: ignore[arg-type]
        output_padding = tuple(more) if is_transposed else ()  # type: ignore[arg-type]
        geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups, output_padding)  # type: ignore[arg-type]
        return GemmNode(op, "conv", x, w, bias, print_geometry(geometry))  # type: ignore[arg-type]
    if node.target is aten.bmm.default:
        lhs, rhs = node.args
        return GemmNode("matmul", "matmul", lhs, rhs)  # type: ignore[arg-type]
    bias = node.args[0] if node.target is aten.addmm.default else None
    if node.kwargs:
        return Unreadable("linear", "addmm with alpha or beta has no lp form")
    lhs, rhs = node.args[-2:]
    if (node.meta.get("custom") or {}).get(SITE_KEY) is None:
        return GemmNode("matmul", "matmul", lhs, rhs) if bias is None else Unreadable("matmul", "addmm has no lp form")  # type: ignore[arg-type]
    weight, is_transposed = untransposed(rhs)  # type: ignore[arg-type]
    if is_transposed:
        return GemmNode("linear", "linear", lhs, weight, bias)  # type: ignore[arg-type]
    return GemmNode("linear", "linear_kn", lhs, rhs, bias)  # type: ignore[arg-type]


def untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """What a node is before transpositions of its last two dims, and whether they are an odd number."""
    is_odd = False
    while node.op == "call_function" and node.target in _TRANSPOSES and _swaps_last_two(node):
        node = node.args[0]  # type: ignore[assignment]
        is_odd = not is_odd
    return node, is_odd


def _swaps_last_two(node: fx.Node) -> bool:
    num_dims = node.meta["val"].dim()
    if node.target is aten.t.default:
        return bool(num_dims == 2)
    if node.target is aten.transpose.int:
        return num_dims >= 2 and {int(d) % num_dims for d in node.args[1:]} == {num_dims - 2, num_dims - 1}  # type: ignore[arg-type]
    dims: Sequence[int] = node.args[1]  # type: ignore[assignment]
    wanted = [*range(num_dims - 2), num_dims - 1, num_dims - 2]
    return num_dims >= 2 and [d % num_dims for d in dims] == wanted


def _attribute(site: JointSite, node: fx.Node) -> None:
    if node.target is _CONV_BACKWARD:
        site.conv_backward = node
        return
    lhs, rhs = site.fwd.args[-2:]
    lhs_root, is_lhs_odd = untransposed(lhs)  # type: ignore[arg-type]
    rhs_root, is_rhs_odd = untransposed(rhs)  # type: ignore[arg-type]
    (left, is_left_odd), (right, is_right_odd) = (untransposed(a) for a in node.args[-2:])  # type: ignore[arg-type]
    # dx = dy rhs^T, or its transpose rhs dy^T; dw = lhs^T dy, or its transpose dy^T lhs
    found: list[tuple[str, Product]] = []
    if right is rhs_root and is_right_odd != is_rhs_odd:
        found.append(("bwd", Product(node, left, is_left_odd, False)))
    if left is rhs_root and is_left_odd == is_rhs_odd:
        found.append(("bwd", Product(node, right, not is_right_odd, True)))
    is_stored_transposed = isinstance(site.gemm, GemmNode) and site.gemm.kind == "linear"
    if left is lhs_root and is_left_odd != is_lhs_odd:
        found.append(("grad", Product(node, right, is_right_odd, is_stored_transposed)))
    if right is lhs_root and is_right_odd == is_lhs_odd:
        found.append(("grad", Product(node, left, not is_left_odd, not is_stored_transposed)))
    if len({role for role, _ in found}) != 1:
        site.stray.append(node)
        return
    role, product = found[0]
    if getattr(site, role) is not None:
        site.stray.append(node)
    else:
        setattr(site, role, product)

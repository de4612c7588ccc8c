"""decompose-attention: fused attention whose products the policy names becomes the two products and what lies between.

    %y = scaled_dot_product_attention(%q, %k, %v)  becomes  %s = matmul(scaled_query(%q), scaled_key(%k))     SITE.qk
                                                            %p = attention_weights(%s)
                                                            %y = matmul(%p, heads_like(%v))                   SITE.pv

Outputs and gradients are those of torch's math backend, bit for bit; the fused kernels differ from it in rounding. The
probabilities are saved for backward, which the fused kernels avoid: attention that no rule names stays fused, and
so does one whose two products are to run as they are.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from passes.ir.gemm_nodes import argument
from passes.ir.program import SITE, Program
from passes.manager import Pass
from runtime.ops import attention


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Rewrites every fused attention of which `program.specs` names a product that is not the identity."""

    name: ClassVar[str] = "decompose-attention"

    def run(self, program: Program) -> bool:
        changed = False
        for _, graph in program.graphs():
            for node in list(graph.nodes):
                site = node.meta.get(SITE)
                if node.target is not F.scaled_dot_product_attention or site is None:
                    continue
                specs = [program.specs.get(f"{site}.{part}") for part in ("qk", "pv")]
                if any(spec is not None and not spec.is_identity for spec in specs):
                    _rewrite(graph, node, site)
                    changed = True
        return changed


def _rewrite(graph: fx.Graph, node: fx.Node, site: str) -> None:
    q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask, dropout_p, is_causal = (argument(node, i + 3, name, default) for i, (name, default) in enumerate(_OPTIONS))
    scale, enable_gqa = node.kwargs.get("scale"), node.kwargs.get("enable_gqa", False)

    def call(function: Any, *args: Any) -> fx.Node:
        return graph.call_function(function, args)

    with graph.inserting_before(node):
        scores = call(
            torch.matmul,
            call(attention.scaled_query, q, scale),
            call(attention.scaled_key, k, q, scale, enable_gqa),
        )
        weights = call(attention.attention_weights, scores, mask, is_causal, dropout_p)
        product = call(torch.matmul, weights, call(attention.heads_like, v, q, enable_gqa))
        new = call(attention.like_query, product, q)
    scores.meta[SITE], product.meta[SITE] = f"{site}.qk", f"{site}.pv"
    new.meta.update({key: value for key, value in node.meta.items() if key != SITE})
    node.replace_all_uses_with(new)
    graph.erase_node(node)


_OPTIONS = (("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False))

"""Conditions: what a pass relies on, looked for in the program itself and not in which passes are said to have run.

decomposed   every product that the policy names stands alone, but where it is to run as it is
uncast       no GEMM is an lp.gemm yet
unannotated  no GEMM has its spec yet
annotated    every GEMM that the policy names has its spec, or a reason why not
cast         every GEMM that has a spec is an lp.gemm
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from passes.ir.gemm_nodes import Composite, read_gemm
from passes.ir.program import SITE, SPEC, Program
from runtime.errors import PassError
from runtime.ops.dialect import OPS


@dataclass(frozen=True)
class Condition:
    """`sentence` says what holds; `is_broken_by` whether a node breaks it; `hint` what makes it hold."""

    sentence: str
    is_broken_by: Callable[[Program, fx.Node], bool]
    hint: str


def check_conditions(program: Program, name: str, requires: tuple[str, ...]) -> None:
    """Raise PassError, naming the first node, where a condition that the pass called `name` requires does not hold."""
    for each in requires:
        condition = CONDITIONS[each]
        for graph_name, graph in program.graphs():
            for node in graph.nodes:
                if condition.is_broken_by(program, node):
                    got = f"%{node.name} of graph {graph_name}, site {node.meta.get(SITE)}"
                    what, expected = "it cannot run yet", condition.sentence
                    raise PassError(what, where=name, expected=expected, got=got, hint=condition.hint)


def _is_gemm(node: fx.Node) -> bool:
    return node.target is OPS["lp.gemm"].run


def _is_undecomposed(program: Program, node: fx.Node) -> bool:
    gemm = read_gemm(node) if SITE in node.meta else None
    specs = [program.specs.get(node.meta[SITE] + part) for part in gemm.parts] if isinstance(gemm, Composite) else []
    return any(spec is not None and not spec.is_identity for spec in specs)


def _is_unannotated(program: Program, node: fx.Node) -> bool:
    site = node.meta.get(SITE)
    return site in program.specs and site not in program.refusals and SPEC not in node.meta and not _is_gemm(node)


CONDITIONS = {
    "decomposed": Condition(
        "every product that the policy names to stand alone",
        _is_undecomposed,
        "decompose-attention,decompose-products before it",
    ),
    "uncast": Condition(
        "no GEMM to be an lp.gemm yet", lambda _, node: _is_gemm(node), "it before insert-casts, or an earlier file"
    ),
    "unannotated": Condition(
        "no GEMM to have its spec yet", lambda _, node: SPEC in node.meta, "it before annotate, or an earlier file"
    ),
    "annotated": Condition(
        "every GEMM that the policy names to have its spec, or a reason why not",
        _is_unannotated,
        "annotate before it",
    ),
    "cast": Condition(
        "every GEMM that has a spec to be an lp.gemm",
        lambda _, node: SPEC in node.meta and not _is_gemm(node),
        "insert-casts before it",
    ),
}

"""select-kernels: each role of each lp.gemm gets the backend that runs it, by exact embedding; the choice and its
reason are kept.
"""

from dataclasses import dataclass
from typing import ClassVar

from passes.cast_keys import gemm_spec
from passes.ir.program import SITE, Program
from passes.manager import Pass
from runtime.kernels.registry import choose
from runtime.kernels.request import GemmRequest
from runtime.numerics.specs import ROLES
from runtime.ops.dialect import OPS


@dataclass(frozen=True)
class SelectKernels(Pass):
    """Writes the attribute `kernels` and `program.choices`."""

    name: ClassVar[str] = "select-kernels"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "cast")

    def run(self, program: Program) -> bool:
        changed = False
        for _, graph in program.graphs():
            for node in graph.nodes:
                if node.target is not OPS["lp.gemm"].run:
                    continue
                spec, kind = gemm_spec(node), str(node.kwargs["kind"])
                site = node.meta[SITE]
                kept = {role: program.choices[site][role] for role in program.refused_roles(site)}
                choices = {
                    role: kept.get(role) or choose(GemmRequest(kind, role, spec.role(role), program.device))
                    for role in ROLES
                }
                kernels = ",".join(choices[role].kernel for role in ROLES)
                program.choices[site] = choices
                changed |= kernels != node.kwargs["kernels"]
                node.kwargs = {**node.kwargs, "kernels": kernels}
        return changed

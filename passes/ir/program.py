"""Program: every graph of a model, the GEMM sites in them, and what the policy says of each site.

    Unit      one torch.fx graph: the forward of a whole model, or of one GEMM-bearing leaf
    Program   units by name, specs by site name, and what the passes learned: choices and refusals

A leaf's graph holds its GEMM, with the weight as an attribute of its module.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from passes.finding import Finding
from runtime.kernels.registry import Choice
from runtime.numerics.specs import LayerSpec, Role
from runtime.ops.dialect import OPS

SITE = "lp_site"
"""Key of `node.meta`: the name of the GEMM site that the node is."""
GROUP = "lp_group"
"""Key of `node.meta`: which of several GEMM nodes of one site it is; 0 if there is one."""
SPEC = "lp_spec"
"""Key of `node.meta`: the LayerSpec that annotate put there."""
REPEATED = "lp_repeated"
"""Key of `node.meta`: True on a GEMM that one forward runs many times, once per time step."""
WEIGHT = "lp_weight"
"""Key of `node.meta`: True on a placeholder that is a weight, or a part of one, and on a weight that was folded."""
NODE_META: dict[str, type] = {
    SITE: str, GROUP: int, SPEC: LayerSpec, REPEATED: bool, WEIGHT: bool,
}  # fmt: skip
"""Every key of `node.meta` that the text form keeps, with what lies under it: a plain type, or one that prints and
parses. An absent key and a false value mean the same."""
STATE = "_lp_state"
"""The attribute under which every compiled module holds the model's RunState; graphs read it by get_attr."""


@dataclass
class Unit:
    """One graph. `path` is the module path from the model's root, "" for the root itself."""

    path: str
    graph: fx.Graph
    kind: Literal["leaf", "module"]


@dataclass
class Program:
    """What the passes work on, and where they leave what they learned."""

    units: dict[str, Unit]
    specs: dict[str, LayerSpec]
    """What the policy says, by site name; a site that is not here is left alone."""
    device: str = "cpu"
    refusals: dict[str, str] = field(default_factory=dict)
    """Sites that the policy names and that run as the uncompiled model does, with the reason."""
    choices: dict[str, dict[Role, Choice]] = field(default_factory=dict)
    """The backend of every site and role."""
    findings: list[Finding] = field(default_factory=list)
    """What passes found wrong or risky in what the policy says."""
    decisions: dict[str, dict[Role, str]] = field(default_factory=dict)
    """What a pass decided about a site and role where the policy left it open, with the reason."""
    passes: list[str] = field(default_factory=list)
    """What has run on it, in order, as passes print: a file says it too."""

    def refused_roles(self, site: str) -> list[Role]:
        """The roles of a site that run as the uncompiled model does, where others run as the policy says."""
        return [role for role, choice in self.choices.get(site, {}).items() if choice.fidelity == "refused"]

    def reasons(self, *sites: str) -> Iterator[tuple[str, str]]:
        """Each site, or role of one as `SITE ROLE`, that does not run as the policy says, with the reason: of these
        sites, or of all.
        """
        for site in sites or dict.fromkeys([*self.refusals, *self.choices]):
            if site in self.refusals:
                yield site, self.refusals[site]
            for role in self.refused_roles(site):
                yield f"{site} {role}", self.choices[site][role].reason

    def graphs(self) -> Iterator[tuple[str, fx.Graph]]:
        """Every graph with a name for messages."""
        for name, unit in self.units.items():
            yield name or "(root)", unit.graph

    def num_nodes(self) -> int:
        return sum(len(graph.nodes) for _, graph in self.graphs())


def site_numbers(program: Program) -> dict[str, int]:
    """The number of each site that the policy names, in the order of their names. Group g of a site has that number
    plus g times how many sites there are: it draws other stochastic bits.
    """
    return {site: number for number, site in enumerate(sorted(program.specs))}


def num_op(program: Program, name: str) -> int:
    """How many nodes of an lp op one forward pass runs."""
    return sum(node.target is OPS[name].run for _, graph in program.graphs() for node in graph.nodes)


def state_node(graph: fx.Graph) -> fx.Node:
    """The node that reads the RunState, made at the top of the graph if it is not there."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == STATE:
            return node
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        return graph.get_attr(STATE)

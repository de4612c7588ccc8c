"""Sites: the products of a model by name, and the program of graphs that hold them.

model.layers.0.mlp.fc      a leaf: one product, named by its path
model.layers.0.matmul_1    the second matmul that the forward of that module writes
"""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from lpcompile.capture.batch_norm import batch_norm_units
from lpcompile.capture.calls import Calls
from lpcompile.capture.graph_types import note_leaf_types
from lpcompile.capture.recording import Opaque, Recording
from lpcompile.capture.repeated import repeated_modules
from lpcompile.capture.torch_layers import is_observed, layer_units, note_writes
from lpcompile.frontends.leaves.find import Leaf, part_graph
from lpcompile.policy.rules import Site
from passes.ir.gemm_nodes import GemmNode, Reading, read_gemm, site_names, stem_of
from passes.ir.program import REPEATED, SITE, Program, Unit
from passes.ir.types import META

Recordings = Mapping[str, Sequence[Recording]]


def find_sites(leaves: Sequence[Leaf], calls: Calls) -> list[Site]:
    """Those of leaves, and those of operations, whether a graph holds them or not."""
    count = sum(leaf.index is not None for leaf in leaves)
    sites = [Site(leaf.name, leaf.op, leaf.index, count, leaf.n, leaf.k) for leaf in leaves]
    ops: dict[str, tuple[str, int | None, int | None]] = {}
    for path, variants in calls.recordings.items():
        for recording in variants:
            for base, gemm, _ in _functional_gemms(path, recording.graph):
                ops |= dict.fromkeys(site_names(gemm, base), (gemm.op, *_sizes(gemm)))
    for name, (op, _) in lost_sites(calls).items():
        ops.setdefault(name, (op, None, None))
    return sites + [Site(name, op, None, count, n, k) for name, (op, n, k) in ops.items()]


def _sizes(gemm: Reading) -> tuple[int | None, int | None]:
    """(n, k) of the weight of a layer that is written as an operation; of activations None."""
    meta = gemm.rhs.meta.get(META) if isinstance(gemm, GemmNode) and gemm.op != "matmul" else None
    if not isinstance(gemm, GemmNode) or meta is None or len(meta.shape) < 2 or "transpose" in gemm.op:
        return None, None
    first, *rest = meta.shape
    return (rest[0], first) if gemm.kind == "linear_kn" else (first, math.prod(rest))


def _functional_gemms(path: str, graph: fx.Graph) -> list[tuple[str, Reading, Any]]:
    """(name, reading, node) of the GEMMs that a module writes as operations."""
    found = [(gemm, node) for node in graph.nodes if (gemm := read_gemm(node)) is not None]
    return [(name, *each) for name, each in zip(_number(path, [gemm for gemm, _ in found]), found)]


def lost_sites(calls: Calls) -> dict[str, tuple[str, str]]:
    """(op, why it runs as in the original) by site, of the products that modules without a graph write."""
    sites: dict[str, tuple[str, str]] = {}
    for path, opaque in calls.opaque.items():
        if isinstance(opaque, Opaque):
            for base, product in zip(_number(path, [each.gemm for each in opaque.products]), opaque.products):
                reason = f"{product.where}: {path or '(root)'} has no graph: {opaque.where}: it {opaque.reason}"
                sites |= dict.fromkeys(site_names(product.gemm, base), (product.gemm.op, reason))
    return sites


def _number(path: str, gemms: Sequence[Reading]) -> list[str]:
    """The names of a module's GEMMs, counted per stem in program order."""
    numbers: Counter[str] = Counter()
    names = []
    for gemm in gemms:
        stem = stem_of(gemm)
        names.append(f"{path}.{stem}_{numbers[stem]}".removeprefix("."))
        numbers[stem] += 1
    return names


def build_program(model: nn.Module, leaves: Sequence[Leaf], recordings: Recordings, mode: str = "train") -> Program:
    """Graphs of leaves and of recorded modules; for mode="infer" also of batch norms, which a pass may fold."""
    units: dict[str, Unit] = {}
    modules = dict(model.named_modules())
    for leaf in leaves:
        graph = part_graph(modules[leaf.path], leaf)
        for node in graph.nodes:
            if read_gemm(node) is not None:
                node.meta[SITE] = leaf.name
        units[leaf.name] = Unit(leaf.name, graph, "leaf", is_observed=is_observed(modules[leaf.path]))
    if mode == "infer" and recordings:
        units |= batch_norm_units(modules)
    for path, variants in recordings.items():
        for number, recording in enumerate(variants):
            graph = copy.deepcopy(recording.graph)  # modules that do the same share a recorded graph
            for name, _, node in _functional_gemms(path, graph):
                node.meta[SITE] = name
            is_hooked = is_observed(modules[path])
            units[unit_name(path, number)] = Unit(path, graph, "module", is_observed=is_hooked)
    note_writes(units.values(), modules, [leaf.path for leaf in leaves])
    units |= {unit_name(path, 0): unit for path, unit in layer_units(units.values(), modules).items()}
    note_leaf_types(units.values(), modules)
    parameter = next(model.parameters(), None)
    return Program(units, {}, device=parameter.device.type if parameter is not None else "cpu")


def note_repeated(model: nn.Module, leaves: Sequence[Leaf], program: Program) -> None:
    """Mark the products that one forward runs several times and that a policy rounds stochastically: annotate refuses
    them, since streams are keyed by the site.
    """
    sites = {name for name, spec in program.specs.items() if spec.is_stochastic}
    repeated = repeated_modules(model, program.units.values()) if sites else set()
    paths = {leaf.name: leaf.path for leaf in leaves}
    for unit in program.units.values():
        for node in unit.graph.nodes if paths.get(unit.path, unit.path) in repeated else ():
            if node.meta.get(SITE) in sites:
                node.meta[REPEATED] = True


def unit_name(path: str, number: int) -> str:
    return f"{path}#{number}"

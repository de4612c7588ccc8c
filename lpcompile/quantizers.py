"""Quantizers of a compiled model: those with state that its policy names are made, kept over compilations, and given.

One per operand of a site, whatever roles and phases of a schedule read it; its name is SITE.x or SITE.w.
"""

from collections.abc import Iterable

import torch
from torch import nn

from lpcompile.compiled import Compiled, get_compiled
from lpcompile.errors import LpError
from lpcompile.frontends.leaves.find import Leaf
from passes.ir.program import Program, quantizer_name
from runtime.numerics.specs import QuantSpec
from runtime.quantize.learned.kinds import make_quantizer
from runtime.quantize.learned.quantizer import Learned
from runtime.quantize.store import STORE, Store, put, quantizers_of


def lp_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the quantizers of a compiled model learn, clips and steps, for a group of the optimizer's own.

    They are among model.parameters() too. Empty where no operand has a quantizer that learns.
    """
    quantizers = get_compiled(model).state.quantizers
    return [parameter for each in quantizers.values() for parameter in each.parameters()]


def install_quantizers(model: nn.Module, compiled: Compiled, before: dict[str, Learned]) -> None:
    """Put into the model, as its last child, the quantizers that its graphs ask for. One of `before`, by name, that
    casts alike stays, with what it learned.
    """
    wanted = _wanted(compiled)
    compiled.state.quantizers = {}
    if not wanted:
        return
    weights = {leaf.name: _weight_of(model, leaf) for leaf in compiled.leaves if leaf.n is not None}
    store = Store()
    for owner, spec in wanted.items():
        site, _, operand = owner.rpartition(".")
        weight = weights.get(site) if operand == "w" else None
        quantizer = before.get(owner)
        if quantizer is None or quantizer.spec != spec:
            quantizer = make_quantizer(spec, owner, is_weight=operand == "w" and site in weights)
            beside = weight if weight is not None else next(model.parameters(), None)
            if beside is not None:
                quantizer.to(beside.device)
            if weight is not None and _is_whole(weight):
                quantizer.observe(weight)
        compiled.state.quantizers[owner] = quantizer
        put(store, quantizer)
    store.train(model.training)
    model.add_module(STORE, store)


def take_quantizers(model: nn.Module) -> dict[str, Learned]:
    """Take them out of the model; by name."""
    quantizers = quantizers_of(model)
    if isinstance(model._modules.get(STORE), Store):
        del model._modules[STORE]
    return quantizers


def _wanted(compiled: Compiled) -> dict[str, QuantSpec]:
    """What the lp.learned_scale nodes of all phases name, sites in the order of the model."""
    wanted: dict[str, QuantSpec] = {}
    for phase in compiled.phases:
        for owner, spec in _asked_for(phase.program):
            if wanted.setdefault(owner, spec) != spec:
                raise LpError(
                    "two phases of the schedule learn one scale in two ways",
                    where=f"policy {compiled.policy.name}: {owner}",
                    expected=str(wanted[owner]),
                    got=str(spec),
                    hint="one quantizer throughout, or none in one of the phases",
                )
    return wanted


def _asked_for(program: Program) -> Iterable[tuple[str, QuantSpec]]:
    for site, choices in program.choices.items():
        if choices:
            fwd = program.specs[site].fwd
            if fwd.lhs.quantizer is not None:
                yield quantizer_name(site, "x"), fwd.lhs
            if fwd.rhs.quantizer is not None:
                yield quantizer_name(site, "w"), fwd.rhs


def _weight_of(model: nn.Module, leaf: Leaf) -> torch.Tensor | None:
    """The weight of a leaf of one product."""
    weight = getattr(model.get_submodule(leaf.path), "weight", None) if not leaf.part else None
    return weight if isinstance(weight, nn.Parameter) else None


def _is_whole(weight: torch.Tensor) -> bool:
    """Whether a weight's values are here, and now."""
    return type(weight) in (torch.Tensor, nn.Parameter) and not weight.is_meta and weight.numel() > 0

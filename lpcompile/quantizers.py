"""Quantizers of a compiled model: those with state that its policy names are made, kept over compilations, and given.

One per operand of a site, whatever roles and phases of a schedule read it; runtime/quantize/owners.py names them.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lpcompile.compiled import Compiled, get_compiled
from lpcompile.errors import LpError
from lpcompile.frontends.leaves.find import Leaf
from runtime.numerics.specs import QuantSpec
from runtime.ops.product import Product
from runtime.quantize.kinds import make_quantizer
from runtime.quantize.learned.quantizer import Learned
from runtime.quantize.observed.end_step import observed_in
from runtime.quantize.observed.quantizer import Observed
from runtime.quantize.owners import owner_of, quantizers_in
from runtime.quantize.stateful import Stateful
from runtime.quantize.store import STORE, Store, put, quantizers_of


def lp_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the quantizers of a compiled model learn, clips and steps, for a group of the optimizer's own.

    They are among model.parameters() too. Empty where no operand has a quantizer that learns.
    """
    quantizers = get_compiled(model).state.quantizers
    return [parameter for each in quantizers.values() for parameter in each.parameters()]


def install_quantizers(model: nn.Module, compiled: Compiled, before: dict[str, Stateful]) -> None:
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
            if isinstance(quantizer, Learned) and weight is not None and _is_whole(weight):
                quantizer.observe(weight)
        compiled.state.quantizers[owner] = quantizer
        put(store, quantizer)
    store.train(model.training)
    model.add_module(STORE, store)
    leave_out_of_ddp(model)


def take_quantizers(model: nn.Module) -> dict[str, Stateful]:
    """Take them out of the model; by name."""
    quantizers = quantizers_of(model)
    if isinstance(model._modules.get(STORE), Store):
        del model._modules[STORE]
        ignored = [name for name in vars(model).pop(_IGNORED, ()) if not name.startswith(f"{STORE}.")]
        if ignored:
            vars(model)[_IGNORED] = ignored
    return quantizers


def rank_state(model: nn.Module) -> dict[str, Tensor]:
    """The state that each rank has for itself, by its keys in the state_dict: of scales that the policy calls per rank.
    A checkpoint that one rank writes for all has that rank's.
    """
    return {
        key: buffer.detach().clone()
        for each in observed_in(get_compiled(model).state.quantizers)
        if each.rule.per_rank
        for key, buffer in _buffers_of(each)
    }


def load_rank_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `rank_state` gave."""
    for each in observed_in(get_compiled(model).state.quantizers):
        for key, buffer in _buffers_of(each):
            if key in state:
                buffer.copy_(state[key])


def _buffers_of(quantizer: Observed) -> list[tuple[str, Tensor]]:
    return [(f"{STORE}.{quantizer.owner}.{name}", buffer) for name, buffer in quantizer.named_buffers()]


def leave_out_of_ddp(model: nn.Module) -> None:
    """What observes agrees by itself at the end of each step, or is a rank's own: DDP sends it with no forward."""
    names = [key for each in observed_in(quantizers_of(model)) for key, _ in _buffers_of(each)]
    if names:
        vars(model)[_IGNORED] = [*vars(model).get(_IGNORED, ()), *names]


_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Where torch's DistributedDataParallel looks."""


def _wanted(compiled: Compiled) -> dict[str, QuantSpec]:
    """What the products of all phases name, sites in the order of the model."""
    wanted: dict[str, QuantSpec] = {}
    for phase in compiled.phases:
        for owner, spec in _asked_for(phase.products):
            if wanted.setdefault(owner, spec) != spec:
                raise LpError(
                    "two phases of the schedule have one scale in two ways",
                    where=f"policy {compiled.policy.name}: {owner}",
                    expected=str(wanted[owner]),
                    got=str(spec),
                    hint="one quantizer throughout, or none in one of the phases",
                )
    return wanted


def _asked_for(products: Mapping[str, Product]) -> Iterable[tuple[str, QuantSpec]]:
    for site, product in products.items():
        for operand, spec in quantizers_in(product.spec).items():
            yield owner_of(site, operand), spec


def _weight_of(model: nn.Module, leaf: Leaf) -> torch.Tensor | None:
    """The weight of a leaf of one product."""
    weight = getattr(model.get_submodule(leaf.path), "weight", None) if not leaf.part else None
    return weight if isinstance(weight, nn.Parameter) else None


def _is_whole(weight: torch.Tensor) -> bool:
    """Whether a weight's values are here, and now."""
    return type(weight) in (torch.Tensor, nn.Parameter) and not weight.is_meta and weight.numel() > 0

"""Store: where quantizers with state live in a model, so that whatever walks a model's parameters finds them.

    model._lp.model.layers.0.mlp.fc.x.clip          `_lp` is the last child of the root; below it, sites by their paths

The child is registered last, so that its keys come after the model's own in a state_dict. It is the identity as a
layer: a Sequential that has it as its last one computes what it did.
"""

from torch import Tensor, nn

from runtime.quantize.stateful import Stateful

STORE = "_lp"


class Store(nn.Module):
    """The quantizers of a model by owner (owners.py); a folder of the names in the paths of sites."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def put(store: Store, quantizer: Stateful) -> None:
    """File a quantizer under its owner's name."""
    folder: nn.Module = store
    *folders, name = quantizer.owner.split(".")
    for each in folders:
        if each not in folder._modules:
            folder.add_module(each, Store())
        folder = folder.get_submodule(each)
    folder.add_module(name, quantizer)


def find_store(model: nn.Module) -> Store | None:
    """The store of a model; None where no quantizer of it has state."""
    store = model._modules.get(STORE)
    return store if isinstance(store, Store) else None


def quantizers_of(model: nn.Module) -> dict[str, Stateful]:
    """The quantizers with state of a model by owner."""
    store = find_store(model)
    modules = store.modules() if store is not None else ()
    return {each.owner: each for each in modules if isinstance(each, Stateful)}

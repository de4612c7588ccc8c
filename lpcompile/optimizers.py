"""make_optimizer: the optimizer that a policy's `update` section asks for.

model = lpcompile(model, "fp8-2018.yaml")
optimizer = make_optimizer(model, "sgd", lr=0.1, momentum=0.9)
attach(model, optimizer)
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import nn

from lpcompile.compiled import Compiled, find_compiled, get_compiled
from lpcompile.errors import LpError, did_you_mean, nearest_names
from lpcompile.policy.resolve import Policy
from runtime.optim.adamw import LowPrecisionAdamW
from runtime.optim.formats import UpdateFormats
from runtime.optim.optimizer import KEYS, AbstractOptimizer
from runtime.optim.sgd import LowPrecisionSGD

Kind = Literal["adamw", "sgd"]


def make_optimizer(
    model: nn.Module,
    kind: Kind = "adamw",
    lr: float = 1e-3,
    params: Iterable[Any] | None = None,
    policy: Policy | None = None,
    seed: int | None = None,
    **numbers: Any,
) -> AbstractOptimizer:
    """LowPrecisionAdamW or LowPrecisionSGD with the formats and rounding of `policy`, by default the compiled model's.

    params: parameters or groups of them, as torch.optim takes; None: those of the model that require a gradient, and
    what its quantizers learn in a group of its own that stays in fp32. seed: of stochastic rounding; None: the model's,
    or 0 of one that was not compiled.
    numbers: momentum, weight_decay (sgd); betas, eps, weight_decay (adamw); loss_scale, by which gradients are divided.
    LpError for a model that was not compiled, with no policy given, and for a kind that there is not; what the
    optimizers raise.
    """
    if kind not in get_args(Kind):
        hint = nearest_names(str(kind), get_args(Kind))
        raise LpError(did_you_mean(f'"{kind}" is not an optimizer', hint), where="make_optimizer")
    compiled = find_compiled(model)
    update = get_compiled(model).policy.update if policy is None else policy.update
    if seed is None:
        seed = 0 if compiled is None else compiled.state.seed
    if params is None:
        params = _groups(model, compiled)
    optimizer: AbstractOptimizer = optimizer_class(kind)(params, lr=lr, formats=update.formats(), seed=seed, **numbers)
    return optimizer


def optimizer_class(kind: Kind) -> Any:
    """The class of a kind: its arguments are (params, lr, ..., formats, seed)."""
    return {"adamw": LowPrecisionAdamW, "sgd": LowPrecisionSGD}[kind]


def update_formats(model: nn.Module) -> UpdateFormats:
    """What the policy of a compiled model says of the update."""
    return get_compiled(model).policy.update.formats()


def _groups(model: nn.Module, compiled: Compiled | None) -> list[dict[str, Any]]:
    quantizers = () if compiled is None else compiled.state.quantizers.values()
    learned = {id(parameter): parameter for each in quantizers for parameter in each.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = {key: getattr(UpdateFormats(), field) for field, key in KEYS.items()}
    groups: list[dict[str, Any]] = [{"params": [each for each in trained if id(each) not in learned]}]
    if clips := [each for each in trained if id(each) in learned]:
        groups.append({"params": clips, **plain})
    return groups

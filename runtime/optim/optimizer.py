"""Optimizer: what the optimizers share. States in formats of their own, kept as they are by state_dict and its load,
and random bits that belong to an element of the whole group of parameters.

    per parameter    step, master (where the parameter is not its own), remainder (of bf16+16), and the moments
    random bits      (seed, step, 4 x number of the group + slot, flat index in the group)

A group is its whole parameters, one behind the other, as ZeRO lays them out: however an engine cuts it, an element has
the same bits.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from runtime.errors import LpError, NotSupported
from runtime.optim.block_names import BlockState, block_state_of
from runtime.optim.block_states import Layout, Place, decoded, encoded, states_of
from runtime.optim.formats import PARAMETER_DTYPES, Storage, UpdateFormats, joined, of_pairs, split, storage_of
from runtime.optim.places import Run, cut_among, local, runs_of
from runtime.optim.rounding import Draw, rounded
from runtime.optim.split_master import SPLIT

KEYS = {"master": "master_format", "momentum": "momentum_format", "variance": "variance_format", "rounding": "rounding"}
"""Field of UpdateFormats -> its key in a group of parameters; `momentum` of torch's SGD is a number."""
_SLOTS = 4


class Weight:
    """One parameter at one step: its gradient, master and states as flat fp32 tensors, and the way back.

    `first`: where in the group the parameter begins.
    """

    def __init__(self, optimizer: "AbstractOptimizer", parameter: Tensor, group: dict[str, Any], first: int) -> None:
        self.optimizer, self.parameter, self.group = optimizer, parameter, group
        self.formats, self.first = formats_of(group), first
        self.state: dict[str, Any] = optimizer.state[parameter]
        self.runs = [Run(begin, size, first + offset) for begin, size, offset in runs_of(parameter)]

    @property
    def step(self) -> int:
        return int(self.state["step"].item())

    def gradient(self) -> Tensor:
        """Of this rank's elements, in fp32."""
        assert self.parameter.grad is not None
        return local(self.parameter.grad).reshape(-1).float()

    def load(self, name: str) -> Tensor:
        """A new fp32 tensor of what is kept under `name`: a moment, or `master`, wherever that is."""
        if block := self._block_state(name):
            kept = [_flat(self.state[each]) for each in states_of(name, block, self.parameter.numel())]
            return decoded(kept, block, self._layout(block), is_signed(name))
        if name != "master" or name in self.state:
            return self._storage(name).load(_flat(self.state[name]))
        held = _flat(self.parameter)
        return (
            joined(held, of_pairs(_flat(self.state["remainder"])))
            if "remainder" in self.state
            else held.float().clone()
        )

    def rounded(self, name: str, values: Tensor, slot: int) -> Tensor:
        """fp32 or float64 values as they will be kept under `name`, in fp32."""
        if (name == "master" and "remainder" in self.state) or self._block_state(name):
            return values.float()  # of blocks, `store` rounds
        format = self.formats.master if name == "master" else self._storage(name).format
        return rounded(values, format, self.formats.rounding, self._draw(slot))

    def store(self, name: str, values: Tensor, slot: int = 0) -> None:
        """Keep what `rounded` gave; of a master the parameter follows. `slot`: of a moment that may be in blocks."""
        if block := self._block_state(name):
            draw = self._draw(slot)
            found = encoded(
                values, block, self._layout(block), is_signed(name),
                lambda y, format: rounded(y, format, self.formats.rounding, draw),
            )  # fmt: skip
            for each, new in zip(states_of(name, block, self.parameter.numel()), found, strict=True):
                _flat(self.state[each]).copy_(new)
            return
        if name != "master":
            self._storage(name).store(values, _flat(self.state[name]))
            return
        weight = values
        if "remainder" in self.state:
            weight, low = split(values)
            of_pairs(_flat(self.state["remainder"])).copy_(low)
        elif "master" in self.state:
            self._storage("master").store(values, _flat(self.state["master"]))
        held = local(self.parameter.detach())
        held.copy_(weight.view(held.shape))

    @property
    def is_own_master(self) -> bool:
        """Whether the parameter is the master, with or without a remainder."""
        return "master" not in self.state

    def _block_state(self, name: str) -> BlockState | None:
        return None if name == "master" else block_state_of(getattr(self.formats, self.optimizer.MOMENTS[name]))

    def _layout(self, state: BlockState) -> Layout:
        runs = [Run(begin, size, offset - self.first) for begin, size, offset in self.runs]
        return Layout(runs, self.parameter.numel(), state.block, cut_among(self.parameter))

    def _storage(self, name: str) -> Storage:
        return storage_of(getattr(self.formats, self.optimizer.MOMENTS.get(name, name)))

    def stream(self, slot: int) -> int:
        """Of the random bits of a slot, one of four."""
        return _SLOTS * int(self.group["number"]) + slot

    def _draw(self, slot: int) -> Draw:
        return Draw(self.group["seed"], self.step, self.stream(slot), self.runs)


class AbstractOptimizer(torch.optim.Optimizer):
    """An optimizer of fp32, bf16 or fp16 parameters, plain ones and DTensors (fully_shard), by groups.

    Every group has the formats of runtime/optim/formats.py and `loss_scale`, by which gradients are divided as they are
    read: a power of two, 1 where they have been unscaled. State is made at the first step; a master narrower than its
    parameter rounds it then, to nearest. Raises NotSupported for other parameters and for sparse gradients.
    """

    skip: bool = False
    """While set, step() does nothing: an engine that cannot drop a step calls it all the same."""

    MOMENTS: ClassVar[dict[str, str]]
    """Name in the state, as torch's own optimizer calls it -> whose format of UpdateFormats it has."""

    def __init__(self, params: Any, defaults: dict[str, Any], formats: UpdateFormats | None, seed: int) -> None:
        formats = formats or UpdateFormats()
        self._firsts: dict[int, int] = {}
        super().__init__(
            params, {**defaults, "seed": seed, **{key: getattr(formats, field) for field, key in KEYS.items()}}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["number"] = len(self.param_groups) - 1  # in the group: DeepSpeed shows step() one of them at a time
        formats = formats_of(group)
        for parameter in group["params"]:
            if parameter.dtype not in PARAMETER_DTYPES:
                raise NotSupported(
                    "this parameter cannot be trained in a low precision", where=type(self).__name__,
                    expected="fp32, bf16 or fp16", got=str(parameter.dtype), hint="a torch.optim optimizer for it",
                )  # fmt: skip
            self._check_blocks(parameter, formats)
            if formats.master == SPLIT and parameter.dtype != torch.bfloat16:
                raise NotSupported(
                    "a master of bf16+16 is a bf16 parameter and its remainder", where=type(self).__name__,
                    expected="bf16 parameters", got=str(parameter.dtype), hint="model.bfloat16(), or master: fp32",
                )  # fmt: skip

    def _check_blocks(self, parameter: Tensor, formats: UpdateFormats) -> None:
        for name in (formats.momentum, formats.variance):
            block = block_state_of(name)
            if block and block.bits < 8 and isinstance(parameter, DTensor):
                raise NotSupported(
                    "two codes a byte are not cut over ranks", where=type(self).__name__, expected="whole parameters",
                    got=f"{name} of a DTensor", hint="states of 8 bits, such as dynamic8/256, or DDP",
                )  # fmt: skip

    def begin_at(self, firsts: Sequence[int]) -> None:
        """Where in its group the first element lies that each group holds here: of an engine that keeps a group as one
        flat tensor, cut over ranks.
        """
        self._firsts = dict(enumerate(firsts))
        for formats in map(formats_of, self.param_groups):
            if block_state_of(formats.momentum) or block_state_of(formats.variance):
                raise NotSupported(
                    "blocks are of one parameter, and where those end in a flat group is not known",
                    where=type(self).__name__, expected="moments in scalar formats",
                    got=f"momentum {formats.momentum}, variance {formats.variance}", hint="DDP, or fully_shard",
                )  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the loss that `closure` gives."""
        if self.skip:
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_loss_scale(group["loss_scale"])
            first = self._firsts.get(group["number"], 0)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group, first)
                first += parameter.numel()
        return loss

    def _step_one(self, parameter: nn.Parameter, group: dict[str, Any], first: int) -> None:
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise NotSupported("sparse gradients are not updated", where=type(self).__name__, hint="sparse=False")
        weight = Weight(self, parameter, group, first)
        if "step" not in weight.state:
            self._begin(weight)
        weight.state["step"] += 1
        self._update(weight)

    @abstractmethod
    def _update(self, weight: Weight) -> None:
        """Moments and master of one parameter, one step on."""

    def _begin(self, weight: Weight) -> None:
        state, parameter, formats = weight.state, weight.parameter, weight.formats
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for name, place in self._kept(parameter, weight.group).items():
            state[name] = _zeros(parameter, place)
        for name in self._moments(weight.group):
            weight.store(
                name, torch.zeros_like(_flat(parameter), dtype=torch.float32)
            )  # 0 is not the code 0 in a table
        values = _flat(parameter).float()
        if formats.master not in (SPLIT, PARAMETER_DTYPES[parameter.dtype]):
            weight.store("master", rounded(values, formats.master, "nearest_even", weight._draw(0)))

    def _kept(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Place]:
        """Name -> where every state of a parameter but its step is kept."""
        formats = formats_of(group)
        kept: dict[str, Place] = {}
        for name, key in self._moments(group).items():
            format = getattr(formats, key)
            block = block_state_of(format)
            kept |= {name: _place(format)} if block is None else states_of(name, block, parameter.numel())
        if formats.master == SPLIT:
            kept["remainder"] = Place(torch.uint8, is_paired=True)
        elif not formats.master_is_parameter(parameter.dtype):
            kept["master"] = _place(formats.master)
        return kept

    def _moments(self, group: dict[str, Any]) -> dict[str, str]:
        return self.MOMENTS

    def bytes_per_parameter(self) -> float:
        """Bytes that weights and states take for each element of the whole parameters, before a step has been made too;
        4 bytes of step a tensor and gradients are not counted.
        """
        totals, count = self._bytes()
        return (sum(totals.values()) - totals["gradient"]) / max(count, 1)

    def bytes_by_part(self) -> dict[str, float]:
        """The same, of each: `weight`, `master` (a remainder too), `moments` with their scales, and `gradient`."""
        totals, count = self._bytes()
        return {part: total / max(count, 1) for part, total in totals.items()}

    def _bytes(self) -> tuple[dict[str, int], int]:
        count, totals = 0, dict.fromkeys(("weight", "master", "moments", "gradient"), 0)
        for group in self.param_groups:
            for parameter in group["params"]:
                count += parameter.numel()
                for part in ("weight", "gradient"):
                    totals[part] += parameter.dtype.itemsize * parameter.numel()
                for name, place in self._kept(parameter, group).items():
                    part = "master" if name in ("master", "remainder") else "moments"
                    totals[part] += place.dtype.itemsize * math.prod(place.shape(parameter))
        return totals, count

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What state_dict gave, bit for bit: no state takes the dtype of its parameter, as torch's own loading has it.

        That of torch.optim.AdamW is one of LowPrecisionAdamW in fp32. LpError where the formats, the groups, or the
        dtype or shape of a state are others than this optimizer's.
        """
        saved_groups = state_dict["param_groups"]
        self._check_groups(saved_groups)
        numbers = [number for group in saved_groups for number in group["params"]]
        parameters = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        found = {}
        for number, (parameter, group) in zip(numbers, parameters, strict=True):
            if state := state_dict["state"].get(number):
                self._check_state(state, parameter, group)
                found[parameter] = state
        filled = [
            {**{key: group[key] for key in (*KEYS.values(), "seed", "loss_scale", "number")}, **saved}
            for group, saved in zip(self.param_groups, saved_groups)
        ]
        super().load_state_dict({"state": {}, "param_groups": filled})
        self.state.clear()
        for parameter, state in found.items():
            self.state[parameter] = {
                name: value.to(device="cpu" if name == "step" else parameter.device, copy=True)
                for name, value in state.items()
            }

    def _check_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        sizes = [[len(group["params"]) for group in groups] for groups in (self.param_groups, saved_groups)]
        if sizes[0] != sizes[1]:
            raise self._refused("the state is of other groups of parameters", str(sizes[0]), str(sizes[1]))
        plain = UpdateFormats()
        for group, saved in zip(self.param_groups, saved_groups):
            for field, key in KEYS.items():
                kept = saved.get(key, getattr(plain, field))
                if kept != group[key]:
                    raise self._refused(f"the state was kept under another `{key}`", group[key], str(kept))

    def _check_state(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
        wanted = {"step": Place(torch.float32), **self._kept(parameter, group)}
        named = {name for name, value in state.items() if value is not None}
        if named != set(wanted):
            raise self._refused("the state is of another kind", ", ".join(wanted), ", ".join(sorted(named)))
        for name, place in wanted.items():
            dtype, shape = place.dtype, () if name == "step" else place.shape(parameter)
            value = state[name]
            if value.dtype != dtype or tuple(value.shape) != shape:
                raise self._refused(
                    f"the state `{name}` does not fit", f"{dtype} of {shape}", f"{value.dtype} of {tuple(value.shape)}"
                )

    def _refused(self, what: str, expected: str, got: str) -> LpError:
        hint = "the policy and model that the state was saved with, or starting the optimizer afresh"
        return LpError(what, where=f"{type(self).__name__}.load_state_dict", expected=expected, got=got, hint=hint)

    def _check_loss_scale(self, scale: float) -> None:
        if not (scale > 0 and float(scale).hex().partition("p")[0] == "0x1.0000000000000"):
            raise NotSupported(
                "loss_scale must be a power of two, so that dividing by it loses no bit", where=type(self).__name__,
                got=f"{scale:g}", hint="1 for gradients that have been unscaled",
            )  # fmt: skip


def formats_of(group: dict[str, Any]) -> UpdateFormats:
    """The formats of a group of parameters."""
    return UpdateFormats(**{field: group[key] for field, key in KEYS.items()})


def is_signed(moment: str) -> bool:
    """Whether a moment can be negative: all but a sum of squares."""
    return moment != "exp_avg_sq"


def check_at_least(where: str, **numbers: float) -> None:
    """LpError for a number below 0, or NaN."""
    for name, number in numbers.items():
        if not number >= 0:
            raise LpError(f"{name} does not fit", where=where, expected=f"{name} >= 0", got=f"{number:g}", hint="0")


def _place(format: str) -> Place:
    storage = storage_of(format)
    return Place(storage.dtype, is_paired=storage.is_paired)


def _zeros(parameter: Tensor, place: Place) -> Tensor:
    """A state of a parameter; of a DTensor's elements a DTensor, cut as it is."""
    shape, device = place.shape(parameter), parameter.device
    if place.size is not None or not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=place.dtype, device=device)
    here = torch.zeros(place.shape(parameter.to_local()), dtype=place.dtype, device=device)
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(
        here, parameter.device_mesh, parameter.placements, shape=torch.Size(shape), stride=strides
    )


def _flat(tensor: Tensor) -> Tensor:
    """This rank's elements in a row, in the same memory if they are contiguous, as states are."""
    return local(tensor.detach()).reshape(-1)

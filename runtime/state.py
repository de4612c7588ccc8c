"""RunState: what changes while a compiled model trains, apart from its weights. One per model, shared by its ops."""

import itertools
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch.fx.experimental.sym_node import DynamicInt

from runtime.compile_marks import constant_result
from runtime.errors import LossScaleWarning
from runtime.numerics.random import signed_seed
from runtime.numerics.specs import Role
from runtime.quantize.kept_casts import Constants
from runtime.recomputation import remembered
from runtime.streams import SITE_BITS, Turn


class Stepped:
    """The optimizers that stepped since the clock last moved, where a model has several (Muon and AdamW; two of a GAN).
    A copy or a pickle of a model has none.
    """

    def __init__(self) -> None:
        self._optimizers: WeakSet[Any] = WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return Stepped, ()

    def begins_step(self, optimizer: Any) -> bool:
        """Whether a step of `optimizer` is of a new step of the model: the first, or one of who stepped already."""
        is_new = not self._optimizers or optimizer in self._optimizers
        if is_new:
            self._optimizers.clear()
        self._optimizers.add(optimizer)
        return is_new


@dataclass
class SiteCalls:
    """Of one site: [seen, as the policy says] by role, and why the first call that did not run so did not."""

    by_role: dict[Role, list[int]] = field(default_factory=lambda: {"fwd": [0, 0], "bwd": [0, 0], "grad": [0, 0]})
    reason: str = ""


@dataclass
class CallCounts:
    """The calls of one compiled model, by site name. Counted where a product runs, in eager code: a counter in compiled
    code would become a guard. Recomputation counts, since it runs.
    """

    sites: defaultdict[str, SiteCalls] = field(default_factory=lambda: defaultdict(SiteCalls))
    are_all: bool = True
    """False once compiled code holds one of the products."""
    told: dict[tuple[str, Role], tuple[int, int]] = field(default_factory=dict)
    """What `since_told` gave last."""

    def ran(self, site: str, role: Role) -> None:
        """One call ran as the policy says."""
        counts = self.sites[site].by_role[role]
        counts[0] += 1
        counts[1] += 1

    def fell_through(self, site: str, reason: str) -> bool:
        """One forward call ran as the uncompiled model does; True if it is the first of its site."""
        calls = self.sites[site]
        calls.by_role["fwd"][0] += 1
        is_first = not calls.reason
        calls.reason = calls.reason or reason
        return is_first

    def seen(self, site: str, role: Role) -> int:
        return self.sites[site].by_role[role][0] if site in self.sites else 0

    def as_said(self, site: str, role: Role) -> int:
        return self.sites[site].by_role[role][1] if site in self.sites else 0

    def since_told(self, site: str, role: Role) -> tuple[int, int]:
        """(calls seen, as the policy says) since this was asked last."""
        now = self.seen(site, role), self.as_said(site, role)
        before = self.told.get((site, role), (0, 0))
        self.told[site, role] = now
        return now[0] - before[0], now[1] - before[1]


@dataclass
class RunState:
    """The clock, the random streams and the overflow flag of one compiled model.

    `step` counts optimizer steps and `micro_batch` the model's forwards with gradients since the last one, within which
    every site counts its calls; `rank` is that of torch.distributed unless it is given. `phase` is the entry of the
    policy's schedule that is in force. `overflow` is set when a gradient operand exceeded its format's largest value
    (it saturates all the same), as a bool tensor (), so that nobody waits for a GPU before whoever owns the loss scale
    reads and clears it. `is_scaled` says that somebody owns it: else the first gradient that is cast warns.
    `strict`: a call that does not run as the policy says raises. `gemm_calls` counts executed forward GEMMs, for tests
    and reports.
    """

    seed: int = 0
    rank: int | None = None
    step: int = 0
    micro_batch: int = 0
    phase: int = 0
    watch_overflow: bool = False
    overflow: bool | Tensor = False
    is_scaled: bool = False
    strict: bool = False
    gemm_calls: int = 0
    is_joint: bool = False
    """Whether code that is compiled has products as nodes that the joint front end lowers (site_products.py)."""
    calls: CallCounts = field(default_factory=CallCounts, compare=False, repr=False)
    """Per site and role: calls seen, and calls that ran as the policy says, since compiling."""
    key: int = field(default=-1, init=False, compare=False, repr=False)
    """By which compiled code, which holds no objects, finds this state: `find_state`."""
    key_text: str = field(default="", init=False, compare=False, repr=False)
    """The key where it must be a constant of traced code: of an int that has changed torch.compile makes a symbol."""
    constants: Constants = field(default_factory=Constants, init=False, compare=False, repr=False)
    """The casts of weights that are kept between uses."""
    stepped: Stepped = field(default_factory=Stepped, init=False, compare=False, repr=False)
    """What tells one step of several optimizers from several steps."""
    num_turns: dict[int, int] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Calls of each site that drew random bits in this micro-batch."""
    quantizers: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Quantizers with state by name, SITE.x or SITE.w: modules of the model (runtime/quantize/store.py)."""

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.compile takes a plain int of a module for a constant, and would compile every step anew
        if name in ("step", "micro_batch") and not torch.compiler.is_compiling():
            value = DynamicInt(int(value))
            vars(self).setdefault("num_turns", {}).clear()
        object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        self.key = next(_KEYS)
        self.key_text = str(self.key)
        _STATES[self.key] = self

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self.is_joint = False  # a copy is not under torch.compile
        self.__post_init__()

    def note_overflow(self, beyond: Tensor | bool) -> None:
        """Set `overflow` where `beyond`, bool or bool (), is True; on the device of the last gradient noted."""
        if not self.is_scaled:
            self.is_scaled = True  # told once
            warnings.warn(_NO_LOSS_SCALE, LossScaleWarning, stacklevel=2)
        seen = self.overflow
        if isinstance(beyond, Tensor):
            seen = seen.to(beyond.device, non_blocking=True) if isinstance(seen, Tensor) else seen
            self.overflow = beyond | seen
        elif beyond:
            self.overflow = True

    @property
    def clock(self) -> tuple[int, int, int, int]:
        """(seed, rank, step, micro-batch) as ops carry them, the seed as a signed number of 64 bits."""
        rank = _rank_of_process() if self.rank is None else self.rank
        return signed_seed(self.seed), rank, self.step, self.micro_batch

    def turn(self, site: int) -> Turn:
        """What keys the random bits of this call of a site, in forward and backward; of a call that activation
        checkpointing runs again, what it was the first time.
        """
        return remembered((self.key, site), lambda: self._next_turn(site))

    def _next_turn(self, site: int) -> Turn:
        number = self.num_turns.get(site, 0)
        self.num_turns[site] = number + 1
        return Turn(self.clock, site + (number << SITE_BITS))


def find_state(key: int) -> RunState | None:
    """The state with this key, while it lives."""
    return _STATES.get(key)


@constant_result
def _rank_of_process() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


_NO_LOSS_SCALE = (
    "the policy has a loss scale and nothing applies it: small gradients vanish, and an overflow goes unnoticed. "
    "Try scaler = lpcompile.LossScaler(model) in the place of torch.amp.GradScaler"
)

_KEYS = itertools.count()
_STATES: WeakValueDictionary[int, RunState] = WeakValueDictionary()

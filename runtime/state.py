"""RunState: what changes while a compiled model trains, apart from its weights. One per model, shared by its ops."""

import itertools
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch.fx.experimental.sym_node import DynamicInt

from runtime.compile_marks import constant_result
from runtime.compiled_reads import Reads, count_in_trace, num_in_trace
from runtime.errors import LossScaleWarning
from runtime.kernels.fake import has_values
from runtime.numerics.random import signed_seed
from runtime.numerics.specs import Role
from runtime.overflow import FirstOverflow
from runtime.quantize.kept_casts import Constants
from runtime.recomputation import remembered
from runtime.streams import SITE_BITS, Turn, seed_of, stream_of


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
    kept: dict[Role, int] = field(default_factory=dict)
    """Bytes that its last call with gradients kept for BWD and GRAD; what another site keeps already counts there."""


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


class Watcher(Protocol):
    """Who looks at products as they run in eager code, and changes nothing (lpcompile/watching/)."""

    def see(self, product: Any, y: Tensor, lhs: Tensor, rhs: Tensor, geometry: Any) -> None:
        """The runtime.ops.product.Product, its result, and its operands before they are cast."""


@dataclass
class RunState:
    """The clock, the random streams and the overflow flag of one compiled model.

    `step` counts optimizer steps and `micro_batch` the model's forwards with gradients since the last one, within which
    every site counts its calls; `rank` is that of torch.distributed unless it is given. `phase` is the entry of the
    policy's schedule that is in force, `evaluation` what holds for modules in evaluation mode instead. `overflow` is
    set when a gradient operand exceeded its format's largest value (it saturates all the same), as a bool tensor (), so
    that nobody waits for a GPU before whoever owns the loss scale reads and clears it. `is_scaled` says that somebody
    owns it: else the first gradient that is cast warns.
    `strict`: a call that does not run as the policy says raises. `gemm_calls` counts executed forward GEMMs, for tests
    and reports.
    """

    seed: int = 0
    rank: int | None = None
    step: int = 0
    micro_batch: int = 0
    phase: int = 0
    evaluation: int | None = None
    watch_overflow: bool = False
    overflow: bool | Tensor = False
    overflowed: FirstOverflow = field(default_factory=FirstOverflow, compare=False, repr=False)
    """Where: the first layer and role. Who clears `overflow` clears it."""
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
    num_turns: dict[int, tuple[int, int, int]] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Of each site that drew random bits: a step, a micro-batch, and how many of its calls did in that."""
    reads: Reads = field(default_factory=Reads, init=False, compare=False, repr=False)
    """The clock and the calls of sites as compiled code reads them."""
    quantizers: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Quantizers with state by name (runtime/quantize/owners.py): modules of the model (runtime/quantize/store.py)."""

    watcher: Watcher | None = field(default=None, init=False, compare=False, repr=False)
    """Who looks at the products of this step; None in all steps but those that are looked at."""

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.compile takes a plain int of a module for a constant, and would compile every step anew
        if name in ("step", "micro_batch") and not torch.compiler.is_compiling():
            value = DynamicInt(int(value))
            is_next = name == "micro_batch" and value == vars(self).get(name, 0) + 1
            if not is_next:  # a clock that only goes on comes to no time twice
                vars(self).setdefault("num_turns", {}).clear()
        object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        self.key = next(_KEYS)
        self.key_text = str(self.key)
        _STATES[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "watcher": None}  # nobody looks at a copy

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self.is_joint, self.reads = False, Reads()  # a copy is not under torch.compile
        self.__post_init__()

    def phase_in(self, is_training: bool) -> int:
        """What a module runs by, in training or evaluation mode."""
        return self.phase if is_training or self.evaluation is None else self.evaluation

    def note_overflow(self, beyond: Tensor | bool, site: str = "", role: str = "") -> None:
        """Set `overflow` where `beyond`, bool or bool (), is True; on the device of the last gradient noted."""
        if not isinstance(beyond, Tensor) or has_values(beyond):
            beyond = bool(beyond) if isinstance(beyond, Tensor) and beyond.is_cpu else beyond
            self.overflowed.note(beyond, site, role)
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
        return signed_seed(self.seed), self._rank(), self.step, self.micro_batch

    def clear_overflow(self) -> None:
        """Forget it: the next step begins."""
        self.overflow = False
        self.overflowed.clear()

    def _rank(self) -> int:
        return _rank_of_process() if self.rank is None else self.rank

    def turn(self, site: int, moves: int = 0) -> Turn:
        """What keys the random bits of this call of a site, in forward and backward; of a call that activation
        checkpointing runs again, what it was the first time. moves: by how many micro-batches the clock goes on in the
        code that asks, and has not yet.
        """
        return remembered((self.key, site), lambda: self._next_turn(site, moves))

    def _next_turn(self, site: int, moves: int) -> Turn:
        seed, rank, step, micro_batch = self.clock
        now = step, micro_batch + moves
        *then, number = self.num_turns.get(site, (*now, 0))
        number = number if (*then,) == now else 0
        self.num_turns[site] = *now, number + 1
        return Turn((seed, rank, *now), site + (number << SITE_BITS))

    def compiled_clock(self, site: int) -> tuple[int, ...]:
        """The clock in code that torch.compile traces, with the seed of this call of the site. `site` has in the bits
        from 18 on which call of it this is in the graph. All of it is read as the graph is called.
        """
        seed, step, micro_batch = _reads_of(self.key_text, site)
        reads = self.reads
        return getattr(reads, seed), self._rank(), getattr(reads, step), getattr(reads, micro_batch)

    def move_in_trace(self) -> None:
        """The graph that is being traced sets the clock on by a micro-batch: what it reads from here on is the next."""
        _note_move(self.key_text)


@constant_result
def _reads_of(key: str, site: int) -> tuple[str, str, str]:
    """Names of what a call of a site reads: its seed, the step, the micro-batch."""
    state = find_state(int(key))
    assert state is not None
    moves, (call, number) = num_in_trace(key, "moves"), divmod(site, 1 << SITE_BITS)

    def ask_seed() -> int:
        """Of the stream of the call, which must be one."""
        turn = _state_of(key).turn(number, moves)
        stream_of(turn.clock, turn.site, 0)
        return seed_of(turn)

    def ask_step() -> int:
        return remembered((int(key), "step"), lambda: int(_state_of(key).step))

    def ask_micro_batch() -> int:
        return remembered((int(key), "micro-batch"), lambda: int(_state_of(key).micro_batch) + moves)

    return (
        state.reads.find_or_make(f"seed_{moves}_{number}_{call}", ask_seed),
        state.reads.find_or_make("step", ask_step),
        state.reads.find_or_make(f"micro_batch_{moves}", ask_micro_batch),
    )


def _state_of(key: str) -> RunState:
    state = find_state(int(key))
    assert state is not None
    return state


@constant_result
def _note_move(key: str) -> None:
    count_in_trace(key, "moves")


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

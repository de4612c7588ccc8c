"""Counter: the bytes this rank handed to collectives, counted from the tensors themselves, step by step.

It knows no formula of the ledger: `expect` only files what the ledger said, so that both can be printed side by side.
How the backend runs an all-reduce or reduce-scatter of its own is its business: counted as by ring, 2 (W - 1) / W and
(W - 1) / W of the tensor.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Kind = Literal["gradient_compressed", "gradient_full", "parameter_gather", "other"]
Message = Sequence[tuple[Kind, Tensor]]
"""What one rank sends to another: the parts of it, and as what they count."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes one rank sent in one step, by kind."""

    counted: Mapping[Kind, int] = field(default_factory=dict)
    predicted: Mapping[Kind, int] = field(default_factory=dict)
    """What the ledger said; it says nothing of the kind `other`."""
    calls: int = 0
    """Collectives called."""

    @property
    def gradient(self) -> int:
        """Bytes sent for gradients, compressed or not."""
        return self.counted.get("gradient_compressed", 0) + self.counted.get("gradient_full", 0)

    @property
    def agrees(self) -> bool:
        """True if predicted == counted for every kind that the ledger predicts."""
        kinds = (set(self.counted) | set(self.predicted)) - {"other"}
        return all(self.counted.get(kind, 0) == self.predicted.get(kind, 0) for kind in kinds)


class WireCounter:
    """Counts what collectives send; `close_step` ends a step. For one sending thread at a time."""

    def __init__(self) -> None:
        self.steps: list[StepBytes] = []
        self._clear()

    def close_step(self) -> StepBytes:
        """End the step: file its totals in `steps`, return them and start from zero."""
        step = StepBytes(dict(self._counted), dict(self._predicted), self._calls)
        self.steps.append(step)
        self._clear()
        return step

    def expect(self, kind: Kind, nbytes: int) -> None:
        """File `nbytes` that the ledger predicts for the collective about to run."""
        self._predicted[kind] += nbytes

    def all_to_all(self, messages: Sequence[Message], rank: int) -> None:
        """One all-to-all: messages[d] goes to rank d, what goes to `rank` itself does not travel."""
        self._calls += 1
        for owner, message in enumerate(messages):
            for kind, part in message if owner != rank else ():
                self._counted[kind] += part.nbytes

    def all_gather(self, message: Message, world: int) -> None:
        """One all-gather of this rank's shard, all parts in one message to each of the others."""
        self._calls += 1
        for kind, shard in message:
            self._counted[kind] += shard.nbytes * (world - 1)

    def all_reduce(self, kind: Kind, tensor: Tensor, world: int) -> None:
        """One ring all-reduce."""
        self._calls += 1
        self._counted[kind] += tensor.nbytes * 2 * (world - 1) // world

    def reduce_scatter(self, kind: Kind, inputs: Tensor, world: int) -> None:
        """One ring reduce-scatter of the whole input."""
        self._calls += 1
        self._counted[kind] += inputs.nbytes * (world - 1) // world

    def one_to_all(self, kind: Kind, tensor: Tensor) -> None:
        """One broadcast or reduce, counted as the tensor once (a ring passes it on once)."""
        self._calls += 1
        self._counted[kind] += tensor.nbytes

    def _clear(self) -> None:
        self._counted: Counter[Kind] = Counter()
        self._predicted: Counter[Kind] = Counter()
        self._calls = 0

"""Stateful: what quantizers with state have in common: a module of the model under `_lp.OWNER`.

learned/     a parameter, which a gradient moves
observed/    buffers, which follow from what was cast in the steps before
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from runtime.numerics.specs import QuantSpec
from runtime.quantize.quantizer import AbstractQuantizer


class Stateful(nn.Module, AbstractQuantizer):
    """One operand of one site; `owner` is its name (owners.py). Its call on x gives the scale, fp32 ()."""

    kind: ClassVar[str]
    """By which a spec names it."""

    def __init__(self, spec: QuantSpec, owner: str, is_weight: bool) -> None:
        super().__init__()
        assert spec.quantizer is not None
        self.spec, self.owner, self.is_weight = spec, owner, is_weight

    @abstractmethod
    def reset_parameters(self) -> None:
        """As before anything was seen."""

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As every module; but a checkpoint of the uncompiled model, which has nothing of this, is complete."""
        given = (state_dict, prefix, local_metadata, strict)
        super()._load_from_state_dict(*given, [], unexpected_keys, error_msgs)

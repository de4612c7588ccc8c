"""Telemetry: a session that looks at the GEMMs of a compiled model while it trains.

    with telemetry(model, every=50) as t:        a hook on the model's forward opens and closes the look, step by step
        train(model)
    print(t.to_text())

Between the steps that are looked at the hook reads the clock, and nothing else runs. Nothing that is computed changes,
and no random bit is drawn. Each process looks at its own tensors: under DDP, what rank 0 says is of rank 0's batch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch import nn

from lpcompile.compiled import COMPILED, Compiled, get_root
from lpcompile.errors import LpError, NotSupported
from lpcompile.policy.resolve import Policy
from lpcompile.watching.candidates import COUNTERFACTUALS, parse_candidates
from lpcompile.watching.page import make_page
from lpcompile.watching.results import Results, gather
from lpcompile.watching.suggestion import Suggestion, suggest
from lpcompile.watching.text import print_results
from lpcompile.watching.watcher import StepRecord, Watcher
from runtime.recomputation import is_recomputing


def telemetry(
    model: nn.Module,
    every: int = 50,
    *,
    counterfactuals: Sequence[str] = COUNTERFACTUALS,
    sample: int = 8192,
    inference: bool = False,
) -> "Telemetry":
    """Look at every GEMM that the policy of a compiled model names, in the optimizer steps that are multiples of
    `every`: per operand amax, shares of underflow, overflow and saturation, SQNR and mean relative error, under the
    cast that runs and under each of `counterfactuals` ("mxfp8", "e4m3 tensor", "int8 row": candidates.py).

    Measured on the operands before they are cast, about `sample` elements of each tensor (whole rows in runs of 8 or
    32; all of a smaller one), amax on all. The step is that of attach() or advance(); where neither is called, each
    change of the weights is one. Forwards without gradients are looked at with inference=True alone.

    Raises LpError: a model that is not compiled, or looked at already, `every` or `sample` below 1, a format that does
    not exist, a policy without rules. NotSupported: torch.compile or compile_joint runs the model, mode="infer".
    """
    for name, value in (("every", every), ("sample", sample)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LpError("not a number of steps" if name == "every" else "not a number of elements",
                          where=f"telemetry({name}=...)", expected="1 or more", got=repr(value))  # fmt: skip
    candidates = parse_candidates(counterfactuals)
    root = get_root(model)
    compiled: Compiled = vars(root)[COMPILED]
    _check(root, compiled)
    return Telemetry(root, every, Watcher(candidates, sample, _ops_of(root)), inference)


def _check(root: nn.Module, compiled: Compiled) -> None:
    where = "telemetry"
    if any(isinstance(hook, _Opens) and hook.session() is not None for hook in root._forward_pre_hooks.values()):
        raise LpError("somebody looks at this model already", where=where, hint="close() of that telemetry first")
    if compiled.joint is not None or root._compiled_call_impl is not None:
        raise NotSupported(
            "torch.compile runs this model, and telemetry looks at products in eager code", where=where,
            hint="telemetry before compile_joint or model.compile(), in a short run in eager code",
        )  # fmt: skip
    if compiled.mode == "infer":
        raise NotSupported(
            'mode="infer" runs graphs, and telemetry looks at products in eager code', where=where,
            hint='lpcompile(model, policy, mode="train"), and inference=True for forwards without gradients',
        )  # fmt: skip
    if not any(policy.rules for _, policy in compiled.policy.phases):
        raise LpError(
            "the policy names no GEMM, so that nothing of ours runs that could be looked at",
            where=f"telemetry, policy {compiled.policy.name}", hint='"fp32-emulated", whose bits are those of fp32',
        )  # fmt: skip


def _ops_of(root: nn.Module) -> Any:
    def op_of(site: str) -> str:
        compiled: Compiled = vars(root)[COMPILED]
        return next((each.op for each in compiled.sites if each.name == site), "linear")

    return op_of


class Telemetry:
    """A session. Results can be read at any time, also once it is closed."""

    def __init__(self, root: nn.Module, every: int, watcher: Watcher, inference: bool) -> None:
        self.every, self.sample, self.inference = every, watcher.size, inference
        self.records: list[StepRecord] = []
        self._root, self._watcher = root, watcher
        self._num_forwards = [0, 0]  # without gradients, with
        self._steps_seen: set[int] = set()
        compiled: Compiled = vars(root)[COMPILED]
        self._policy: Policy = compiled.policy
        self._specs = dict(compiled.phase.program.specs)
        self._sites = {site.name: site for site in compiled.sites}
        self._began_at, self._missed, self._version = int(compiled.state.step), 0, _version(root)
        self._hook = root.register_forward_pre_hook(_Opens(ref(self)), prepend=True)
        self._is_closed = False

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the hook away; what was measured stays."""
        self._hook.remove()
        self._watcher.record, self._watcher.is_open = None, False
        compiled = vars(self._root).get(COMPILED)
        if compiled is not None and compiled.state.watcher is self._watcher:
            compiled.state.watcher = None
        self._is_closed = True

    def results(self) -> Results:
        """Everything as values. Raises LpError where nothing ran that could be looked at."""
        compiled = vars(self._root).get(COMPILED)
        if compiled is not None:  # products that were found as they ran
            self._specs |= dict(compiled.phase.program.specs)
            self._sites |= {site.name: site for site in compiled.sites}
        found = gather(
            self.records,
            self._policy,
            self._specs,
            self._sites,
            [each.name for each in self._watcher.candidates],
            self.every,
            self.sample,
            self._watcher.refused,
        )
        if not found.gemms:
            raise self._nothing_ran()
        return found

    def to_text(self, rows: int | None = 20) -> str:
        """The GEMMs that lose most, at most `rows` (None: all), and what the other formats would do."""
        return print_results(self.results(), rows)

    def to_json(self) -> str:
        """All numbers, by step and over all steps; SQNR null where a cast changed nothing, or of nothing but zeros."""
        return json.dumps(self.results().plain(), indent=1, allow_nan=False)

    def to_html(self, path: str | Path) -> Path:
        """One self-contained page with plots; returns its path."""
        target = Path(path)
        target.write_text(make_page(self.results(), self.suggestion()), encoding="utf-8")
        return target

    def suggest(self, extends: str | None = None) -> str:
        """A policy file that extends the one that ran, with a rule for every GEMM that loses far more than the others,
        and the SQNR it would have. extends: how the file names the policy that ran; None: its shipped name, or else the
        file it was read from; one made in Python is written out.
        """
        return self.suggestion().to_yaml(extends)

    def suggestion(self) -> Suggestion:
        """The same as values."""
        return suggest(self.results(), self._watcher.candidates)

    def _begin(self) -> None:
        """A forward of the model is to come."""
        compiled = vars(self._root).get(COMPILED)
        if compiled is None or is_recomputing():
            return
        watcher, has_gradients = self._watcher, torch.is_grad_enabled()
        self._num_forwards[has_gradients] += 1
        if not (has_gradients or self.inference):
            watcher.is_open = False  # a backward of this step may still come
            return
        step = self._now(compiled)
        self._steps_seen.add(step)
        if step % self.every:
            compiled.state.watcher, watcher.record, watcher.is_open = None, None, False
            return
        if not self.records or self.records[-1].step != step:
            self.records.append(StepRecord(step))
        watcher.record, watcher.is_open = self.records[-1], True
        compiled.state.watcher = watcher

    def _now(self, compiled: Compiled) -> int:
        """The step of the model's clock; where nobody moves that, changes of the weights are counted."""
        step = int(compiled.state.step)
        if step != self._began_at:
            return step
        version = _version(self._root)
        self._missed, self._version = self._missed + (version != self._version), version
        return step + self._missed

    def _nothing_ran(self) -> LpError:
        without, with_gradients = self._num_forwards
        if with_gradients and self._steps_seen and not any(step % self.every == 0 for step in self._steps_seen):
            got = f"steps {min(self._steps_seen)} to {max(self._steps_seen)}"
        elif with_gradients:
            got = "a model that ran, but none of its products in eager code"
        else:
            got = f"{without} forwards without gradients" if without else "a model that never ran"
        return LpError(
            "nothing was looked at", where="telemetry",
            expected=f"a forward with gradients in a step that is a multiple of {self.every}", got=got,
            hint="inference=True" if without and not with_gradients else "",
        )  # fmt: skip


class _Opens:
    """A forward pre-hook of the root. A copy of the model is not looked at."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        session, compiled = self.session(), vars(module).get(COMPILED)
        if session is not None:
            session._begin()
        elif compiled is not None:  # nobody holds the session any more
            compiled.state.watcher = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Opens, (_nobody,)


def _nobody() -> None:
    return None


def _version(root: nn.Module) -> int:
    """What moves whenever the weights are updated."""
    trained = next((each for each in root.parameters() if each.requires_grad), None)
    return 0 if trained is None or trained.is_inference() else trained._version

"""Kernels: what multiplies. Each is one object in one file of runtime/kernels/gemm/, which registers it with its place
in the order of preference; a site asks them in that order, once, and keeps the answer.

A kernel that accepts is held against exact products on this machine first (runtime/kernels/self_test.py); one that
fails there has declined. Fidelity of an accepted GEMM:

    bitwise       equal to the reference, bit for bit
    format-exact  operands embed, same accumulator and output format; only the order of additions differs (bound in
                  the reason)
    bounded       a stated cause makes it differ by a stated bound
    emulated      runs in the emulation kernel, which rounds after every add
    refused       runs as the uncompiled model does; the reason says why
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from runtime.errors import NotSupported
from runtime.kernels.cpu.epilogue import finish
from runtime.kernels.direct import AbstractDirect
from runtime.kernels.request import GemmRequest
from runtime.kernels.self_test import fault_of
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec

Fidelity = Literal["bitwise", "format-exact", "bounded", "emulated", "refused"]


@dataclass(frozen=True)
class Choice:
    """A kernel that accepted: `kernel` is its name, `backend` the family that reports count it under."""

    backend: str
    kernel: str
    fidelity: Fidelity
    reason: str


@dataclass(frozen=True)
class Declined:
    """Why a kernel did not accept; "" where the numbers are not of its kind and nobody would expect it to."""

    reason: str = ""


@dataclass(frozen=True)
class Epilogue:
    """What follows a product y (..., M, N): y * rows * columns + bias + residual, then a relu, each rounded once."""

    rows: Tensor | None = None
    """The scale along M, (M, 1), or one number."""
    columns: Tensor | None = None
    """The scale along N, or one number."""
    bias: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False

    @property
    def is_bias(self) -> bool:
        """Whether a bias is all there may be before the residual."""
        return self.rows is None and self.columns is None

    def after(self, y: Tensor) -> Tensor:
        """The epilogue of y, which nothing else may hold."""
        residual = None if self.residual is None else self.residual.reshape(y.shape)
        return finish(y, self.rows, self.columns, self.bias, residual, self.relu)


class AbstractKernel(ABC):
    """One way to multiply two matrices of grid values."""

    name: str
    """By which the text form, the torch ops and reports name it; no other kernel has it."""
    backend: str
    device: str = ""
    """The type of device it runs on, and is asked for; "" for any."""
    dtype: torch.dtype | None = torch.float32
    """In which operands are multiplied; None: as they come."""
    out: str = "fp32"
    """The format of what it returns."""
    is_own_op: bool = False
    """Whether it stands for the layer's own op in the tensors' dtype, which tracing leaves to the compiler."""
    has_native: bool = False
    """Whether a layer without scales may run as torch's own op of the layer instead, on the same operands."""
    is_matrix_only: bool = False
    """Whether a convolution is laid out as matrices for it."""
    is_exact: bool = False
    """Whether its products are those of the reference, bit for bit."""

    @abstractmethod
    def consider(self, request: GemmRequest) -> Choice | Declined:
        """Whether it runs this GEMM, how exactly, and why; asked once per site and role."""

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        """(..., M, K) x (..., K, N) of what `load` gave -> (..., M, N), by torch unless a kernel has its own; `key` is
        for stochastic sums.
        """
        return torch.matmul(lhs, rhs)

    def c_function(self) -> object | None:
        """The C function that multiplies, for products so small that they run without Python in between
        (kernels/cpu/small.py); None: there is none.
        """
        return None

    def direct(self, spec: GemmSpec) -> AbstractDirect | None:
        """Its convolutions without matrices, with the same bits; None: it has matrices alone."""
        return None

    def load(self, grid: Tensor) -> Tensor:
        """Grid values in a dtype that it multiplies; exact."""
        return grid if self.dtype is None else grid.to(self.dtype)

    def run(self, lhs: Tensor, rhs: Tensor, epilogue: Epilogue, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        """The product with what follows it; a kernel that does more in its own pass over y overrides this."""
        return epilogue.after(self.multiply(lhs, rhs, spec, key))

    def num_units(self, request: GemmRequest, num_k: int) -> float | None:
        """By how many 2^-24 sum|a b| a product of grid values may differ from the exact one, for the self-test; 0: it
        is the reference's; None: it needs no test.
        """
        return 0 if self.is_exact else num_k

    def accepts(self, fidelity: Fidelity, reason: str) -> Choice:
        return Choice(self.backend, self.name, fidelity, reason)


def register(kernel: AbstractKernel, preference: int) -> None:
    """Add a kernel to the registry; of two that accept, the one with the smaller `preference` runs."""
    _REGISTRY[kernel.name] = (preference, kernel)


def unregister(name: str) -> None:
    del _REGISTRY[name]


def kernels() -> list[AbstractKernel]:
    """All, the preferred first."""
    from runtime.kernels import gemm as gemm  # fills the registry

    return [kernel for _, kernel in sorted(_REGISTRY.values(), key=lambda row: row[0])]


def get_kernel(name: str) -> AbstractKernel:
    """The kernel of this name. Raises NotSupported if there is none."""
    if name not in _REGISTRY:
        raise NotSupported("there is no such kernel", expected=", ".join(_REGISTRY), got=f'"{name}"')
    return _REGISTRY[name][1]


def choose(request: GemmRequest) -> Choice:
    """The first kernel that accepts and is right on this machine. Raises NotSupported, naming every reason, when none
    does.
    """
    declined: list[str] = []
    for kernel in kernels():
        if kernel.device not in ("", request.device):
            continue
        answer = kernel.consider(request)
        fault = fault_of(kernel, request) if isinstance(answer, Choice) else answer.reason
        if isinstance(answer, Choice) and not fault:
            notes = "".join(f"; {note}" for note in declined)
            return Choice(answer.backend, answer.kernel, answer.fidelity, answer.reason + notes)
        if fault:
            declined.append(f"{kernel.name} declined: {fault}")
    numbers = f"{request.kind} {request.role} as `{request.spec}`"
    raise NotSupported(f"no kernel runs {numbers}", got="; ".join(declined) or "none is for these numbers")


_REGISTRY: dict[str, tuple[int, AbstractKernel]] = {}

"""Plan: everything about one GEMM site that does not change from call to call, and the text that says it."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from runtime.kernels import gemm as gemm  # fills the registry
from runtime.kernels.registry import AbstractKernel, get_kernel
from runtime.numerics.specs import ROLES, LayerSpec, Role
from runtime.ops.contractions import AbstractContraction, Conv, ConvGeometry, Linear, LinearKN, Matmul
from runtime.ops.im2col import as_matrices

KINDS: dict[str, AbstractContraction] = {"linear": Linear(), "linear_kn": LinearKN(), "matmul": Matmul()}


@dataclass(frozen=True)
class GemmPlan:
    """Everything about one site that does not change from call to call. `kernels` names the chosen kernels
    of runtime/kernels/registry.py, by role.
    """

    kind: str
    spec: LayerSpec
    kernels: tuple[str, str, str]
    site: int
    geometry: ConvGeometry | None = None
    lifetime: str = ""
    """Of BWD's cast of a weight, where it is kept (runtime/quantize/kept_casts.py)."""
    name: str | None = None
    """Under which the calls of the site are counted; None: they are not."""

    @property
    def contraction(self) -> AbstractContraction:
        return contraction_of(self.kind, self.geometry)

    def contraction_of(self, role: Role) -> AbstractContraction:
        """What lays out the GEMM of one role: a convolution is laid out as matrices for a kernel that has none."""
        if self.geometry is not None and self.kernel(role).is_matrix_only:
            return as_matrices(self.geometry, self.kernel(role).direct(self.spec.role(role)))
        return self.contraction

    def kernel(self, role: Role) -> AbstractKernel:
        return get_kernel(self.kernels[ROLES.index(role)])

    def at(self, site: int) -> "GemmPlan":
        """This plan, whose random bits are those of `site`."""
        return self if site == self.site else replace(self, site=site)

    @cached_property
    def stochastic_sums(self) -> frozenset[Role]:
        """The roles whose sums draw random bits."""
        return frozenset(role for role in ROLES if self.spec.role(role).accumulator.mode == "stochastic")

    @cached_property
    def text(self) -> str:
        """What `read` reads, and torch ops take for a plan."""
        geometry = print_geometry(self.geometry) if self.geometry else ""
        return plan_text(self.kind, str(self.spec), ",".join(self.kernels), self.site, geometry)

    @staticmethod
    @lru_cache(maxsize=4096)
    def read(text: str) -> "GemmPlan":
        kind, spec, kernels, site, geometry, *name = text.split("|", 5)
        plan = GemmPlan.parse(kind, spec, kernels, int(site), geometry)
        return replace(plan, name=name[0]) if name else plan

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(kind: str, spec: str, kernels: str, site: int, geometry: str, lifetime: str = "") -> "GemmPlan":
        """From the attributes of an lp.gemm node. A geometry reads `stride=1,1 padding=0,0 dilation=1,1 groups=1`."""
        fwd, bwd, grad = kernels.split(",")
        return GemmPlan(kind, LayerSpec.parse(spec), (fwd, bwd, grad), site, parse_geometry(geometry), lifetime)


def plan_text(kind: str, spec: str, kernels: str, site: int, geometry: str, name: str = "") -> str:
    """`GemmPlan.text`, of the attributes of an lp.gemm node. `name`: of the site, where a state is found by it."""
    return f"{kind}|{spec}|{kernels}|{site}|{geometry}" + (f"|{name}" if name else "")


def contraction_of(kind: str, geometry: ConvGeometry | None) -> AbstractContraction:
    """The contraction of a kind of KINDS, or the convolution of this geometry."""
    return KINDS[kind] if geometry is None else Conv(geometry)


def parse_geometry(text: str) -> ConvGeometry | None:
    if not text:
        return None
    fields = {
        key: tuple(int(n) for n in value.split(",")) for key, _, value in (part.partition("=") for part in text.split())
    }
    groups, more = fields["groups"][0], fields.get("output_padding", ())
    return ConvGeometry(fields["stride"], fields["padding"], fields["dilation"], groups, more)


def print_geometry(geometry: ConvGeometry) -> str:
    rows = {
        "stride": geometry.stride,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
        "groups": (geometry.groups,),
    }
    if geometry.is_transposed:
        rows["output_padding"] = geometry.output_padding
    return " ".join(f"{key}={','.join(map(str, value))}" for key, value in rows.items())

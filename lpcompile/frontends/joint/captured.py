"""Captured: what a joint front end made of the graphs compiled so far."""

from dataclasses import dataclass, field


@dataclass
class Captured:
    """Counts over all graphs of one model."""

    backend: str
    num_graphs: int = 0
    num_products: int = 0
    """FWD, BWD and GRAD, each one, that were rewritten in the graphs."""
    num_casts: int = 0
    """Casts in the graphs."""
    num_cast_uses: int = 0
    """Operands that read them: how many casts there would be without sharing."""
    roles: dict[str, set[str]] = field(default_factory=dict)
    """By site, the roles that some graph holds."""

    def __str__(self) -> str:
        graphs = f"{self.num_graphs} joint graph{'' if self.num_graphs == 1 else 's'} captured"
        casts = f"{self.num_casts} casts, read by {self.num_cast_uses} operands"
        how = "run op by op" if self.backend == "aot_eager" else f"run by {self.backend}"
        return f"{graphs}, {self.num_products} products rewritten in them; {casts}; {how}"

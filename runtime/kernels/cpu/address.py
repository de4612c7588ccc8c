"""Address: where the elements of a tensor lie, for the C++ kernels; the one place that asks."""

from torch import Tensor

from runtime.errors import LpError


def address(x: Tensor) -> int:
    """Of the first element, for a kernel that runs inside of a torch op. Raises LpError for a tensor without memory
    (fake, or on `meta`), whose address of 0 a kernel would follow.
    """
    where = x.data_ptr()
    if not where and x.numel():
        raise LpError(
            "this tensor has no memory", where="a C++ kernel", expected="a tensor with values", got=type(x).__name__,
            hint="torch.ops.lp, whose ops know what shape they give",
        )  # fmt: skip
    return where

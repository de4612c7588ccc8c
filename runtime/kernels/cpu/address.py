"""Address: where the elements of a tensor lie, for kernels that run inside of a torch op; the one place that asks."""

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


def can_be_written(out: Tensor, x: Tensor, scale: Tensor | None = None) -> bool:
    """Whether a kernel may write `out` while it reads x and the scale: x itself, or memory of its own."""
    if not out.is_contiguous():
        return False
    memory = out.untyped_storage().data_ptr()
    if scale is not None and scale.untyped_storage().data_ptr() == memory:
        return False
    is_same = x.is_contiguous() and x.data_ptr() == out.data_ptr()
    return is_same or x.untyped_storage().data_ptr() != memory


def check_product(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> None:
    """Raise torch's RuntimeError for matrices that do not fit: a kernel would read past the end of one."""
    if a_MK.dim() != 2 or b_KN.dim() != 2 or a_MK.shape[1] != b_KN.shape[0]:
        left, right = ("x".join(map(str, each.shape)) for each in (a_MK, b_KN))
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({left} and {right})")
    if bias_N is not None and bias_N.shape != (b_KN.shape[1],):
        raise RuntimeError(f"a bias of shape {tuple(bias_N.shape)} does not fit {b_KN.shape[1]} columns")

"""Einsum of two operands as one batched matrix product: which labels are batch, rows, columns and sum, and the permutes
around it.

    "bqhd,bkhd->bhqk"     batch bh, rows q, columns k, sum d     left (bh, q, d) . right (bh, d, k) = (bh, q, k)

The labels of a group are in the order of the output, those of the sum in the order of the alphabet (capitals first), as
torch.einsum has it: the same products are summed in the same order and give the same bits. Where the output begins
with labels of the right operand, torch multiplies right by left: a policy's `a` stays the left operand, and the order
of the sums may differ, by the machine's library.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """An equation taken apart: a label of both operands is in batch or in sums, one of the left alone in rows, one of
    the right alone in columns; a label that is summed in one operand alone is in no group.
    """

    left: str
    right: str
    out: str
    batch: str
    rows: str
    columns: str
    sums: str

    @staticmethod
    def of(equation: str) -> "Labels":
        """Groups of `ab,bc->ac`; without an arrow the output is every label that occurs once, in alphabetical order."""
        inputs, arrow, out = equation.replace(" ", "").partition("->")
        left, right = inputs.split(",")
        if not arrow:
            out = "".join(sorted(label for label in left + right if (left + right).count(label) == 1))
        return Labels(
            left,
            right,
            out,
            batch="".join(label for label in out if label in left and label in right),
            rows="".join(label for label in out if label not in right),
            columns="".join(label for label in out if label not in left),
            sums="".join(sorted(label for label in left if label in right and label not in out)),
        )


def why_no_product(equation: str) -> str:
    """Why an equation of two operands is not one batched product of matrices; empty if it is."""
    if "." in equation:
        return "an ellipsis is not taken apart"
    labels = Labels.of(equation)
    if any(len(set(side)) != len(side) for side in (labels.left, labels.right)):
        return "a label twice in one operand takes its diagonal"
    if set(labels.left + labels.right) != set(labels.batch + labels.rows + labels.columns + labels.sums):
        return "a label of one operand only is summed before the product"
    if not labels.sums:
        return "no label is summed"
    if not labels.rows or not labels.columns:
        return "a product with a vector is no GEMM"
    return ""


def left_matrices(x: Tensor, equation: str) -> Tensor:
    """The left operand as (batch, rows, sums)."""
    labels = Labels.of(equation)
    return _grouped(x, labels.left, (labels.batch, labels.rows, labels.sums))


def right_matrices(x: Tensor, equation: str) -> Tensor:
    """The right operand as (batch, sums, columns)."""
    labels = Labels.of(equation)
    return _grouped(x, labels.right, (labels.batch, labels.sums, labels.columns))


def from_matrices(product: Tensor, left: Tensor, right: Tensor, equation: str) -> Tensor:
    """(batch, rows, columns) back to the output's dims; sizes are read from the operands."""
    labels = Labels.of(equation)
    sizes = dict(zip(labels.left, left.shape)) | dict(zip(labels.right, right.shape))
    order = labels.batch + labels.rows + labels.columns
    return product.reshape([sizes[label] for label in order]).permute([order.index(label) for label in labels.out])


def _grouped(x: Tensor, labels: str, groups: tuple[str, str, str]) -> Tensor:
    sizes = dict(zip(labels, x.shape))
    shape = []
    for group in groups:
        extent = 1
        for label in group:
            extent *= sizes[label]
        shape.append(extent)
    return x.permute([labels.index(label) for group in groups for label in group]).reshape(shape)

"""Operators: which of torch's are computations. They take tensors, or are known to make one, give tensors or numbers,
and name no file.

What prints, seeds, waits for other processes or changes a mode of the process is none: it takes no tensor, or gives
something else, or gives nothing and changes no operand.
"""

from functools import lru_cache
from typing import Any

import torch


def is_computation(op: Any) -> bool:
    """Whether an op of torch.ops, or some overload of a packet, is a computation."""
    overloads = [op] if isinstance(op, torch._ops.OpOverload) else [getattr(op, each) for each in op.overloads()]
    spaces = {each.namespace for each in overloads}
    if spaces == {"lp"}:
        return True
    return spaces == {"aten"} and any(_is_computation(each._schema) for each in overloads)


@lru_cache(maxsize=8192)
def is_function_of_tensors(space: str, name: str) -> bool:
    """Whether the function `name` of a namespace of torch is a computation, by the operator of its name. `__add__` and
    its like, and the few that are no operator, are by name.
    """
    if space == "torch.Tensor" and name.startswith("__"):
        return name not in _NO_OPERATORS
    names = (f"{space.removeprefix('torch.').replace('.', '_')}_{name}", name)
    for each in names:
        op = getattr(torch.ops.aten, each, None)
        if isinstance(op, torch._ops.OpOverloadPacket):
            return is_computation(op)
    return name in _WITHOUT_OPERATOR.get(space, ())


def is_factory(name: str) -> bool:
    """Whether a function makes a tensor of no other, by the last part of its name; overloads included."""
    parts = name.split(".")
    base = parts[3] if name.startswith("torch.ops.aten.") and len(parts) > 3 else parts[-1]
    return base.removeprefix("fft_") in _FACTORIES


def _is_computation(schema: Any) -> bool:
    operands = [each for each in schema.arguments if "Tensor" in str(each.type) and not each.is_out]
    name = schema.name.removeprefix("aten::")
    if not operands and not is_factory(name) and name not in _OF_TYPES:
        return False
    if any(each.name == "filename" for each in schema.arguments):
        return False
    changes = any(each.alias_info is not None and each.alias_info.is_write for each in operands)
    gives = bool(schema.returns) and all(str(each.type) in _RESULTS for each in schema.returns)
    return gives or (not schema.returns and (changes or name in _CHECKS))


_RESULTS = {"Tensor", "Optional[Tensor]", "List[Tensor]", "int", "float", "bool", "number", "complex", "List[int]"}
_CHECKS = {"_assert_async", "_assert_tensor_metadata"}
"""They give nothing and look at a tensor: torch.export writes them."""

_FACTORIES = {
    *(
        "arange",
        "asarray",
        "empty",
        "empty_permuted",
        "empty_strided",
        "eye",
        "fftfreq",
        "full",
        "linspace",
        "logspace",
    ),
    *("normal", "ones", "rand", "randint", "randn", "randperm", "range", "rfftfreq", "scalar_tensor", "tensor"),
    *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window", "polar", "complex"),
    *("sparse_coo_tensor", "tril_indices", "triu_indices", "zeros"),
}
_OF_TYPES = {"can_cast", "promote_types", "result_type"}
"""They take dtypes and give a truth or a dtype."""

_NO_OPERATORS = {"__array__", "__array_wrap__", "__delitem__", "__dlpack__", "__dlpack_device__"}
_WITHOUT_OPERATOR = {
    "torch": {
        *("asarray", "dsmm", "hsmm", "lobpcg", "saddmm", "spmm", "unravel_index"),
        *("_sym_sqrt", "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_sum"),
    },
    "torch.Tensor": {
        *("bfloat16", "bool", "byte", "cdouble", "cfloat", "char", "double", "float", "half", "int", "long", "short"),
        *("as_subclass", "data_ptr", "dim_order", "is_shared", "lu", "ndimension", "nelement", "new", "new_tensor"),
        *("numpy", "qscheme", "to_sparse_coo", "tolist", "type", "unique", "xpu"),
    },
}

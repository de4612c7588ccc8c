"""Names: how other systems spell what this one has, read as the row that is meant; case does not matter.

    torch.float8_e4m3fn, FLOAT8E4M3FN (ONNX), kFloat8E4M3 (TransformerEngine), fp8_e4m3     e4m3
    per_token, rowwise                                                                      row
    Binary8p3se, p3109_k8p3se (gfloat)                                                      binary8p3
    fprop, dgrad, wgrad                                                                     fwd, bwd, grad

A name that stands for several rows (fp8, fp6, fp4, float64 ...) is refused with what each is for, never guessed.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from runtime.numerics.block_formats import BLOCK_FORMATS
from runtime.numerics.formats import FORMATS


def format_of(name: str) -> str:
    """The row that a spelling means; the name itself where it is none of these."""
    base, colon, options = name.strip().partition(":")
    plain = _plain(base)
    if p3109 := re.fullmatch(r"(?:p3109[-_.]?k?|binary)([0-9]+p[0-9]+)(|[su][ef])", plain):
        return f"binary{p3109[1]}{p3109[2].removesuffix('se')}" + colon + options.lower()
    for known in (plain, plain.replace("_", "-"), plain.replace("-", "")):
        if known in _ROWS:
            return _ROWS[known] + colon + options.lower()
    return base.lower() + colon + options.lower() if _is_parsed(base.lower()) else name


def word_of(kind: str, word: str) -> str:
    """A granularity, scale rule, rounding, op, role or operand as this system writes it."""
    known = _WORDS.get(kind, {})
    if kind == "op" and word == "Conv1D":  # transformers' class: a linear layer whose weight is stored as (in, out)
        return "linear"
    plain = _plain(word).replace("-", "_")
    return known.get(plain, known.get(plain.replace("_", ""), plain if plain in known.values() else word))


def ambiguity(name: str) -> str:
    """What a name of several rows, or of none, may mean; "" where it is neither."""
    plain = _plain(name).replace("_", "").replace("-", "")
    if grouped := re.fullmatch(r"(u?int[2-8]|nf4|fp8|e4m3)(?:g|gs|group)([0-9]+)", plain):
        of = format_of(grouped[1])
        return f"{{format: {of}, scale: {{granularity: block, block: [1, {grouped[2]}]}}}} for groups of {grouped[2]}"
    return _SEVERAL.get(plain, "")


def meaning(kind: str, word: str) -> str:
    """What to write for a word that other systems have for several of these, or for none; "" for any other word."""
    plain = _plain(word).replace("-", "_").removeprefix("per_").replace("_", "").removesuffix("wise")
    return _SEVERAL_WORDS.get(kind, {}).get(plain, "")


def nearest_format(name: str) -> str:
    """A hint naming the closest formats of the same width and kind, if there are, and what there is."""
    plain = _plain(name)
    close = _neighbours(plain)
    if not close:
        family = [each for each in _ROWS if _family(each) == _family(plain)]
        close = [_ROWS[each] for each in get_close_matches(plain, family, 1, 0.75)]
    guess = " or ".join(f'"{each}"' for each in close) + "? " if close else ""
    return f"{guess}Known: {', '.join([*FORMATS, *BLOCK_FORMATS])}"


def as_parts(name: str) -> str:
    """How e5m3, which has no row, is said all the same; "" where the name is no such one."""
    if (sizes := _sizes(_plain(name))) is None or not (2 <= sizes[0] <= 8 and sizes[1] <= 23):
        return ""
    return "1-{0}-{1}, which is a sign, {0} bits of exponent and {1} of mantissa".format(*sizes)


def _sizes(name: str) -> tuple[int, int] | None:
    """Bits of exponent and mantissa of a name such as e5m3, ue5m3 or float8_e5m3fn."""
    found = re.fullmatch(r"(?:(?:fp|float)[0-9]+[-_]?)?u?e([0-9]{1,2})m([0-9]{1,2})(?:fn)?", name)
    return (int(found[1]), int(found[2])) if found else None


def _neighbours(name: str) -> list[str]:
    """The rows whose exponent and mantissa are nearest in size, of these those of the nearest width, two at most; of
    other names none.
    """
    if (sizes := _sizes(name)) is None:
        return []
    rows = {each: of for each in FORMATS if each != "e8m0" and (of := _sizes(each)) is not None}
    steps = {each: (of[0] - sizes[0], of[1] - sizes[1]) for each, of in rows.items()}
    away = {
        each: (abs(exponent) + abs(mantissa), abs(exponent + mantissa)) for each, (exponent, mantissa) in steps.items()
    }
    nearest = min(away.values())
    return [each for each in away if away[each] == nearest][:2] if nearest[0] <= 2 else []


def _family(name: str) -> str:
    """What must not change from a name to a guess: first letters and width (fp8, mxfp6); of e4m3 that it is one."""
    if re.match(r"e[0-9]+m[0-9]+", name):
        return "e_m"
    found = re.match(r"[a-z]+-?[0-9]*", name)
    return found[0].replace("-", "") if found else ""


def _plain(name: str) -> str:
    """In small letters, without the module or enumeration that it stands in."""
    return re.sub(
        r"^(torch|tf|jnp|jax\.numpy|np|numpy|tp|tensorproto|te\.dtype|tex\.dtype|onnx)\.", "", name.strip().lower()
    )


def _is_parsed(name: str) -> bool:
    """Whether a name is one that a format is read from."""
    return re.fullmatch(r"u?int[0-9]+|[0-9]+-[0-9]+-[0-9]+|pow2|dlfloat16", name) is not None


_OTHER_NAMES = {
    "fp32": "float32 float f32 single binary32 kfloat32",
    "fp16": "float16 half f16 binary16 kfloat16 ieee-fp16",
    "bf16": "bfloat16 bfloat brain-float16 kbfloat16",
    "tf32": "tensorfloat32 tensor-float32 tensorfloat-32",
    "e4m3": "e4m3fn e4m3-fn float8-e4m3fn float8-e4m3 f8e4m3fn f8e4m3 fp8-e4m3 fp8-e4m3fn kfloat8e4m3 ocp-e4m3",
    "e5m2": "float8-e5m2 f8e5m2 fp8-e5m2 float8e5m2 kfloat8e5m2 ocp-e5m2",
    "e4m3-fnuz": "e4m3fnuz float8-e4m3fnuz f8e4m3fnuz fp8-e4m3fnuz float8e4m3fnuz",
    "e5m2-fnuz": "e5m2fnuz float8-e5m2fnuz f8e5m2fnuz fp8-e5m2fnuz float8e5m2fnuz",
    "e3m2": "fp6-e3m2 float6-e3m2fn float6-e3m2 float6e3m2fn e3m2fn",
    "e2m3": "fp6-e2m3 float6-e2m3fn float6-e2m3 float6e2m3fn e2m3fn",
    "e2m1": "fp4-e2m1 float4-e2m1fn float4-e2m1 float4e2m1 float4e2m1fn float4-e2m1fn-x2 e2m1fn kfloat4e2m1",
    "e8m0": "e8m0fnu float8-e8m0fnu float8e8m0 float8-e8m0 ue8m0 kfloat8e8m0",
    "mxfp8": "mxfp8-e4m3 mxfp8e4m3 mx-fp8 mx-fp8-e4m3",
    "mxfp8-e5m2": "mxfp8e5m2 mx-fp8-e5m2",
    "mxfp6": "mxfp6-e2m3 mxfp6e2m3 mx-fp6-e2m3",
    "mxfp6-e3m2": "mxfp6e3m2 mx-fp6-e3m2",
    "mxfp4": "mxfp4-e2m1 mxfp4e2m1 mx-fp4",
    "mxint8": "mx-int8",
    "nvfp4": "nvfp4-e2m1 nv-fp4",
    "nf4": "normal-float4 normalfloat4",
    "int1": "binary",
    "int4": "s4 i4 qint4",
    "int8": "s8 i8 qint8",
    "int16": "s16 i16",
    "int32": "s32 i32 qint32",
    "uint4": "u4 quint4",
    "uint8": "u8 quint8",
}
_ROWS = {spelling: row for row, names in _OTHER_NAMES.items() for spelling in names.split()}
_ROWS |= {spelling.replace("-", ""): row for spelling, row in _ROWS.items()}
_ROWS |= {row: row for row in (*FORMATS, *BLOCK_FORMATS)}

_SEVERAL = {
    "fp8": "e4m3 (weights, activations) or e5m2 (gradients)",
    "float8": "e4m3 (weights, activations) or e5m2 (gradients)",
    "hfp8": "hfp8-143 for weights and activations, e5m2 for gradients",
    "fp6": "e2m3 or e3m2, or with scales per block mxfp6 or mxfp6-e3m2",
    "float6": "e2m3 or e3m2, or with scales per block mxfp6 or mxfp6-e3m2",
    "fp4": "e2m1, fp4-radix4 or nf4, or with scales per block mxfp4 or nvfp4",
    "float4": "e2m1, fp4-radix4 or nf4, or with scales per block mxfp4 or nvfp4",
    "int": "int8, int4 or another width",
    "float64": "fp32, the widest format here",
    "fp64": "fp32, the widest format here",
    "double": "fp32, the widest format here",
    "f64": "fp32, the widest format here",
}

_SEVERAL_WORDS = {
    "scale granularity": {
        "vector": "row or column (one per token or feature), or block, block: [1, 16], for vectors of 16 along the sum",
        "axis": "row, column, or of a weight channel (one per output channel or feature)",
        "subchannel": "block, block: [1, 128], for groups of 128 along the sum",
    }
}

_OTHER_WORDS = {
    "scale granularity": {
        "tensor": "per_tensor tensorwise tensor_wise",
        "row": "per_row rowwise row_wise token per_token tokenwise",
        "column": "per_column columnwise column_wise col",
        "channel": "per_channel channelwise channel_wise output_channel per_output_channel",
        "block": "per_block blockwise block_wise group per_group groupwise group_wise tile tilewise",
    },
    "scale rule": {"amax": "absmax abs_max max current dynamic", "pow2": "power_of_two power_of_2 po2"},
    "rounding": {
        "nearest_even": "rne round_nearest_even nearest rtne rn even half_even",
        "nearest_away": "rna round_half_away half_away",
        "toward_zero": "rtz truncate trunc rz towards_zero",
        "stochastic": "sr stochastic_rounding",
    },
    "op": {
        "linear": "dense fc addmm",
        "matmul": "bmm einsum batch_matmul sdpa attention",
        **{f"conv{dims}d": "" for dims in (1, 2, 3)},
        **{f"conv_transpose{dims}d": f"convtranspose{dims}d" for dims in (1, 2, 3)},
    },
    "position": {"first": "", "last": ""},
}
_WORDS = {
    kind: {spelling: row for row, names in rows.items() for spelling in (row, *names.split())}
    for kind, rows in _OTHER_WORDS.items()
}

ROLE_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("fwd", "fprop", "forward"), "fwd"),
    **dict.fromkeys(("bwd", "dgrad", "grad_input", "backward_input", "input_grad", "dinput"), "bwd"),
    **dict.fromkeys(("grad", "wgrad", "grad_weight", "backward_weight", "weight_grad", "dweight"), "grad"),
}
OPERAND_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("x", "input", "inputs", "activation", "activations", "act", "input_activations"), "x"),
    **dict.fromkeys(("w", "weight", "weights", "kernel"), "w"),
    **dict.fromkeys(("dy", "dout", "grad_output", "grad_out", "output_grad", "gradient", "grad_y"), "dy"),
}


def key_of(key: str, spellings: Mapping[str, str], known: Sequence[str]) -> str:
    """The key that a spelling means where that key is known; else the spelling."""
    plain = key.lower().replace("-", "_")
    meant = spellings.get(plain, plain)
    return next((name for name in (key, meant, plain) if name in known), key)

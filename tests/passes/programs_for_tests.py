"""Programs as text, for tests of the IR and of passes: what a person would write as the input of one pass."""

E4M3 = "e4m3 nearest_even"
ROW, COLUMN = "e4m3 nearest_even row/amax", "e4m3 nearest_even column/amax"


def layer(fwd: str, bwd: str | None = None, grad: str | None = None) -> str:
    """A LayerSpec with the same cast of both operands in each role, fp32 sums and outputs."""
    return "; ".join(
        f"{role}: {cast} * {cast} -> fp32 -> fp32"
        for role, cast in (("fwd", fwd), ("bwd", bwd or fwd), ("grad", grad or fwd))
    )


SCALED = (
    f"fwd: {ROW} * {ROW} -> fp32 -> fp32; bwd: {ROW} * {COLUMN} -> fp32 -> fp32; "
    f"grad: {COLUMN} * {COLUMN} -> fp32 -> fp32"
)


def linear(spec: str = SCALED) -> str:
    """y = x w^T + b as the graph of a leaf called `fc`, x (8, 4), w (16, 4)."""
    return f"""
"builtin.module"() ({{
  "lp.site"() {{name = "fc", spec = "{spec}"}} : () -> ()
  "torch.graph"() <{{sym_name = "fc", path = "fc", kind = "leaf"}}> ({{
  ^bb0(%x : tensor<8x4xf32>):
    %w = "torch.get_attr"() {{target = "weight"}} : () -> tensor<16x4xf32>
    %b = "torch.get_attr"() {{target = "bias"}} : () -> tensor<16xf32>
    %y = "torch.call_function"(%x, %w, %b) {{target = "torch._C._nn.linear", lp.site = "fc"}}
      : (tensor<8x4xf32>, tensor<16x4xf32>, tensor<16xf32>) -> tensor<8x16xf32>
    "torch.return"(%y) : (tensor<8x16xf32>) -> ()
  }}) : () -> ()
}}) : () -> ()
"""


def attention(spec: str = layer(E4M3)) -> str:
    """Fused attention of a module called `attn`, q, k and v (2, 4, 8, 16), both products named."""
    return f"""
"builtin.module"() ({{
  "lp.site"() {{name = "attn.sdpa_0.qk", spec = "{spec}"}} : () -> ()
  "lp.site"() {{name = "attn.sdpa_0.pv", spec = "{spec}"}} : () -> ()
  "torch.graph"() <{{sym_name = "attn#0", path = "attn", kind = "module"}}> ({{
  ^bb0(%q : tensor<2x4x8x16xf32>, %k : tensor<2x4x8x16xf32>, %v : tensor<2x4x8x16xf32>):
    %y = "torch.call_function"(%q, %k, %v)
      {{target = "torch.nn.functional.scaled_dot_product_attention", args = "_, _, _, is_causal=True",
        lp.site = "attn.sdpa_0"}}
      : (tensor<2x4x8x16xf32>, tensor<2x4x8x16xf32>, tensor<2x4x8x16xf32>) -> tensor<2x4x8x16xf32>
    "torch.return"(%y) : (tensor<2x4x8x16xf32>) -> ()
  }}) : () -> ()
}}) : () -> ()
"""


def einsum(spec: str = layer(E4M3)) -> str:
    """einsum("bqd,bkd->bqk", a, b) of a module called `m`."""
    return f"""
"builtin.module"() ({{
  "lp.site"() {{name = "m.einsum_0", spec = "{spec}"}} : () -> ()
  "torch.graph"() <{{sym_name = "m#0", path = "m", kind = "module"}}> ({{
  ^bb0(%a : tensor<2x3x4xf32>, %b : tensor<2x5x4xf32>):
    %y = "torch.call_function"(%a, %b) {{target = "torch.einsum", args = "'bqd,bkd->bqk', _, _",
      lp.site = "m.einsum_0"}} : (tensor<2x3x4xf32>, tensor<2x5x4xf32>) -> tensor<2x3x5xf32>
    "torch.return"(%y) : (tensor<2x3x5xf32>) -> ()
  }}) : () -> ()
}}) : () -> ()
"""


def two_layers(spec: str = layer(E4M3), between: str = "") -> str:
    """z = a(x) + b(x): two linear layers of a module called `block`; `between` is put between their products."""
    return f"""
"builtin.module"() ({{
  "lp.site"() {{name = "block.a", spec = "{spec}"}} : () -> ()
  "lp.site"() {{name = "block.b", spec = "{spec}"}} : () -> ()
  "torch.graph"() <{{sym_name = "block#0", path = "block", kind = "module"}}> ({{
  ^bb0(%x : tensor<8x4xf32>):
    %wa = "torch.get_attr"() {{target = "a.weight"}} : () -> tensor<4x4xf32>
    %wb = "torch.get_attr"() {{target = "b.weight"}} : () -> tensor<4x4xf32>
    %a = "torch.call_function"(%x, %wa) {{target = "torch._C._nn.linear", lp.site = "block.a"}}
      : (tensor<8x4xf32>, tensor<4x4xf32>) -> tensor<8x4xf32>
    {between}
    %b = "torch.call_function"(%x, %wb) {{target = "torch._C._nn.linear", lp.site = "block.b"}}
      : (tensor<8x4xf32>, tensor<4x4xf32>) -> tensor<8x4xf32>
    %z = "torch.call_function"(%a, %b) {{target = "operator.add"}}
      : (tensor<8x4xf32>, tensor<8x4xf32>) -> tensor<8x4xf32>
    "torch.return"(%z) : (tensor<8x4xf32>) -> ()
  }}) : () -> ()
}}) : () -> ()
"""


def convolutions(spec: str = layer(E4M3), between: str = "", ends: str = "%y") -> str:
    """y = b(max_pool(relu(a(x)))): two convolutions of a module `net`. `between` stands before that of b; the graph
    gives `ends`.
    """
    pool = "_, 3, stride=2, padding=1, dilation=1, ceil_mode=False, return_indices=False"
    conv = 'target = "torch.conv2d", args = "_, _, None, (1, 1), (1, 1), (1, 1), 1"'
    kinds = ", ".join("tensor<2x4x4x4xf32>" for _ in ends.split(","))
    return f"""
"builtin.module"() ({{
  "lp.site"() {{name = "net.a", spec = "{spec}"}} : () -> ()
  "lp.site"() {{name = "net.b", spec = "{spec}"}} : () -> ()
  "torch.graph"() <{{sym_name = "net#0", path = "net", kind = "module"}}> ({{
  ^bb0(%x : tensor<2x4x8x8xf32>):
    %wa = "torch.get_attr"() {{target = "a.weight"}} : () -> tensor<4x4x3x3xf32>
    %wb = "torch.get_attr"() {{target = "b.weight"}} : () -> tensor<4x4x3x3xf32>
    %a = "torch.call_function"(%x, %wa) {{{conv}, lp.site = "net.a"}}
      : (tensor<2x4x8x8xf32>, tensor<4x4x3x3xf32>) -> tensor<2x4x8x8xf32>
    %relu = "torch.call_function"(%a) {{target = "torch.nn.functional.relu", args = "_, inplace=False"}}
      : (tensor<2x4x8x8xf32>) -> tensor<2x4x8x8xf32>
    %pool = "torch.call_function"(%relu) {{target = "torch.nn.functional.max_pool2d", args = "{pool}"}}
      : (tensor<2x4x8x8xf32>) -> tensor<2x4x4x4xf32>
    {between}
    %y = "torch.call_function"(%pool, %wb) {{{conv}, lp.site = "net.b"}}
      : (tensor<2x4x4x4xf32>, tensor<4x4x3x3xf32>) -> tensor<2x4x4x4xf32>
    "torch.return"({ends}) : ({kinds}) -> ()
  }}) : () -> ()
}}) : () -> ()
"""


def reshaped_layers(spec: str = layer(E4M3)) -> str:
    """q, k and v of x (2, 6, 4), each of a reshape of its own to (12, 4), in a module called `attn`."""
    names = ("q", "k", "v")
    sites = "".join(f'\n  "lp.site"() {{name = "attn.{name}", spec = "{spec}"}} : () -> ()' for name in names)
    weights = "".join(
        f'\n    %w{name} = "torch.get_attr"() {{target = "{name}.weight"}} : () -> tensor<4x4xf32>' for name in names
    )
    products = "".join(
        f"""
    %x_{name} = "torch.call_function"(%x) {{target = "torch.Tensor.reshape", args = "_, -1, 4"}}
      : (tensor<2x6x4xf32>) -> tensor<12x4xf32>
    %{name} = "torch.call_function"(%x_{name}, %w{name}) {{target = "torch._C._nn.linear", lp.site = "attn.{name}"}}
      : (tensor<12x4xf32>, tensor<4x4xf32>) -> tensor<12x4xf32>"""
        for name in names
    )
    return f"""
"builtin.module"() ({{{sites}
  "torch.graph"() <{{sym_name = "attn#0", path = "attn", kind = "module"}}> ({{
  ^bb0(%x : tensor<2x6x4xf32>):{weights}{products}
    "torch.return"(%q, %k, %v) : (tensor<12x4xf32>, tensor<12x4xf32>, tensor<12x4xf32>) -> ()
  }}) : () -> ()
}}) : () -> ()
"""

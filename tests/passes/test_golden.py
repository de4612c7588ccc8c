# ruff: noqa: E501
"""Each pass as text: the input graph, the pass, and what of the output is the point."""

import pytest

from runtime.errors import PassError
from tests.passes.golden import check, run
from tests.passes.programs_for_tests import E4M3, ROW, attention, einsum, layer, linear, two_layers


def test_decompose_attention_makes_two_products_with_a_site_each() -> None:
    check(
        run(attention(), "decompose-attention"),
        """
// CHECK-LABEL: sym_name = "attn#0"
// CHECK:      ^bb0(%q : tensor<2x4x8x16xf32>, %k : {{.*}}, %v :
// CHECK-NEXT: [[Q:%[a-z0-9_]+]] = "torch.call_function"(%q) {target = "runtime.ops.attention.scaled_query", args = "_, None"}
// CHECK-NEXT: [[K:%[a-z0-9_]+]] = "torch.call_function"(%k, %q) {target = "runtime.ops.attention.scaled_key"
// CHECK-NEXT: [[S:%[a-z0-9_]+]] = "torch.call_function"([[Q]], [[K]]) {target = "torch.matmul", lp.site = "attn.sdpa_0.qk"}
// CHECK-NEXT: [[P:%[a-z0-9_]+]] = "torch.call_function"([[S]]) {target = "runtime.ops.attention.attention_weights", args = "_, None, True, 0.0"}
// CHECK-NEXT: [[V:%[a-z0-9_]+]] = "torch.call_function"(%v, %q) {target = "runtime.ops.attention.heads_like"
// CHECK-NEXT: [[Y:%[a-z0-9_]+]] = "torch.call_function"([[P]], [[V]]) {target = "torch.matmul", lp.site = "attn.sdpa_0.pv"}
// CHECK-NEXT: [[O:%[a-z0-9_]+]] = "torch.call_function"([[Y]], %q) {target = "runtime.ops.attention.like_query"}
// CHECK-SAME: -> tensor<2x4x8x16xf32>
// CHECK-NEXT: "torch.return"([[O]])
// CHECK-NOT:  scaled_dot_product_attention
""",
    )


def test_decompose_attention_leaves_what_no_rule_names() -> None:
    unnamed = attention().replace("attn.sdpa_0.", "other.sdpa_0.")
    check(
        run(unnamed, "decompose-attention"),
        """
// CHECK: target = "torch.nn.functional.scaled_dot_product_attention"
// CHECK-NOT: runtime.ops.attention
""",
    )


def test_decompose_products_makes_an_einsum_one_product() -> None:
    check(
        run(einsum(), "decompose-products"),
        """
// CHECK:      [[A:%[a-z0-9_]+]] = "torch.call_function"(%a) {target = "runtime.ops.einsum.left_matrices", args = "_, 'bqd,bkd->bqk'"}
// CHECK-NEXT: [[B:%[a-z0-9_]+]] = "torch.call_function"(%b) {target = "runtime.ops.einsum.right_matrices", args = "_, 'bqd,bkd->bqk'"}
// CHECK-NEXT: [[P:%[a-z0-9_]+]] = "torch.call_function"([[A]], [[B]]) {target = "torch.matmul", lp.site = "m.einsum_0"}
// CHECK-NEXT: "torch.call_function"([[P]], %a, %b) {target = "runtime.ops.einsum.from_matrices"
// CHECK-SAME: -> tensor<2x3x5xf32>
// CHECK-NOT:  target = "torch.einsum"
""",
    )


def test_annotate_puts_the_spec_on_the_node_and_changes_nothing_else() -> None:
    check(
        run(linear(layer(E4M3)), "annotate"),
        """
// CHECK:      %y = "torch.call_function"(%x, %w, %b) {target = "torch._C._nn.linear", lp.site = "fc"
// CHECK-SAME: lp.spec = "fwd: e4m3 nearest_even * e4m3 nearest_even -> fp32 -> fp32; bwd:
// CHECK-NEXT: "torch.return"(%y)
""",
    )


def test_annotate_refuses_a_scale_inside_the_sum_with_the_way_out() -> None:
    check(
        run(linear(layer(ROW)), "annotate"),
        """
// CHECK: "lp.site"() {name = "fc", {{.*}} bwd = {{{.*}}fidelity = "refused", reason = "bwd w: a scale per row varies along the sum of a linear; use granularity column, or rule pow2"}, grad = {{{.*}}fidelity = "refused", reason = "grad dy: a scale per row varies
// CHECK: lp.spec = "fwd: e4m3 nearest_even row/amax * e4m3 nearest_even row/amax -> fp32 -> fp32; bwd: fp32 nearest_even * fp32 nearest_even -> fp32 -> fp32; grad: fp32
""",
    )


def test_insert_casts_feeds_the_gemm_with_scaled_casts() -> None:
    check(
        run(linear(), "annotate,insert-casts"),
        """
// CHECK:      %_lp_state = "torch.get_attr"() {target = "_lp_state"} : () -> !lp.state
// CHECK:      [[SX:%[a-z0-9_]+]] = "lp.scale"(%x) {spec = "e4m3 nearest_even row/amax"} : (tensor<8x4xf32>) -> tensor<8x1xf32>
// CHECK-NEXT: [[QX:%[a-z0-9_]+]] = "lp.quantize"(%x, [[SX]]) {spec = "e4m3 nearest_even row/amax", site = 0, slot = 0
// CHECK-SAME: -> !lp.quant<"e4m3", "row", 1, tensor<8x4xbf16>>
// CHECK-NEXT: [[SW:%[a-z0-9_]+]] = "lp.scale"(%w) {{.*}} -> tensor<16x1xf32>
// CHECK-NEXT: [[QW:%[a-z0-9_]+]] = "lp.quantize"(%w, [[SW]]) {{.*}}slot = 1{{.*}} -> !lp.quant<"e4m3", "row", 1, tensor<16x4xbf16>>
// CHECK-NEXT: [[SG:%[a-z0-9_]+]] = "lp.scale"(%x) {spec = "e4m3 nearest_even column/amax"} : (tensor<8x4xf32>) -> tensor<1x4xf32>
// CHECK-NEXT: [[QG:%[a-z0-9_]+]] = "lp.quantize"(%x, [[SG]]) {{.*}}slot = 3{{.*}} -> !lp.quant<"e4m3", "column", 0, tensor<8x4xbf16>>
// CHECK-NEXT: [[Y:%[a-z0-9_]+]] = "lp.gemm"(%x, %w, %b, [[QX]], [[SX]], [[QW]], [[SW]], [[QG]], [[SG]], %_lp_state)
// CHECK-SAME: {kind = "linear", {{.*}}kernels = ",,"
// CHECK-SAME: operands = ["lhs", "rhs", "bias", "fwd_lhs", "fwd_lhs_scale", "fwd_rhs", "fwd_rhs_scale", "grad_lhs", "grad_lhs_scale", "state"]
// CHECK-SAME: -> tensor<8x16xf32>
// CHECK-NEXT: "torch.return"([[Y]])
// CHECK-NOT:  torch.call_function
""",
    )


def test_insert_casts_casts_once_what_two_roles_cast_alike() -> None:
    check(
        run(linear(layer(E4M3)), "annotate,insert-casts"),
        """
// CHECK-COUNT-2: "lp.quantize"
// CHECK-NOT: "lp.quantize"
// CHECK-NOT: "lp.scale"
// CHECK: "lp.gemm"
""",
    )


def test_share_casts_casts_once_what_two_products_cast_alike() -> None:
    check(
        run(two_layers(), "annotate,insert-casts,share-casts"),
        """
// CHECK:      [[Q:%[a-z0-9_]+]] = "lp.quantize"(%x)
// CHECK:      "lp.gemm"(%x, %wa, [[Q]], %{{[a-z0-9_]+}}, [[Q]], %_lp_state)
// CHECK-NOT:  "lp.quantize"(%x)
// CHECK:      "lp.gemm"(%x, %wb, [[Q]], %{{[a-z0-9_]+}}, [[Q]], %_lp_state)
""",
    )


def test_share_casts_keeps_two_casts_around_a_write() -> None:
    write = '%w = "torch.call_function"(%x) {target = "torch.Tensor.add_", args = "_, 1"}'
    between = f"{write} : (tensor<8x4xf32>) -> tensor<8x4xf32>"
    check(
        run(two_layers(between=between), "annotate,insert-casts,share-casts"),
        """
// CHECK:     "lp.quantize"(%x)
// CHECK:     "lp.gemm"(%x, %wa
// CHECK:     torch.Tensor.add_
// CHECK:     "lp.quantize"(%x)
// CHECK:     "lp.gemm"(%x, %wb
""",
    )


def test_select_kernels_names_a_method_per_role_and_keeps_the_choice() -> None:
    check(
        run(linear(layer(E4M3)), "annotate,insert-casts,select-kernels"),
        """
// CHECK: "lp.site"() {name = "fc", {{.*}}fwd = {backend = "{{[a-z_]+}}", kernel = "[[METHOD:[a-z0-9_]+]]", fidelity = "
// CHECK: "lp.gemm"({{.*}}kernels = "[[METHOD]],
""",
    )


ORDERS = {
    "insert-casts": "insert-casts: it cannot run yet. Expected every GEMM that the policy names to have its spec.*annotate",
    "select-kernels": "select-kernels: it cannot run yet. .*Got %y of graph fc, site fc. Try annotate before it",
    "share-casts": "share-casts: it cannot run yet. .*Try annotate before it",
    "annotate,share-casts": "Expected every GEMM that has a spec to be an lp.gemm. .*Try insert-casts before it",
    "annotate,select-kernels": "Expected every GEMM that has a spec to be an lp.gemm. .*Try insert-casts before it",
    "annotate,insert-casts,annotate": "annotate: it cannot run yet. Expected no GEMM to be an lp.gemm yet",
}


@pytest.mark.parametrize("passes", ORDERS)
def test_an_order_that_cannot_be_is_an_error_that_says_what_comes_first(passes: str) -> None:
    with pytest.raises(PassError, match=ORDERS[passes]):
        run(linear(), passes)


@pytest.mark.parametrize("program", [attention(), einsum()])
def test_annotate_before_the_products_stand_alone_is_an_error(program: str) -> None:
    with pytest.raises(PassError, match=r"to stand alone.*Try decompose-attention,decompose-products before it"):
        run(program, "annotate")
    assert run(program, "decompose-attention,decompose-products,annotate")

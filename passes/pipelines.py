"""Pipelines: the passes by name, and the orders in which they are run."""

from passes.annotate import Annotate
from passes.cancel_casts import CancelCasts
from passes.choose_accumulator import ChooseAccumulator
from passes.decompose_attention import DecomposeAttention
from passes.decompose_products import DecomposeProducts
from passes.fold_batchnorm import FoldBatchnorm
from passes.fold_constants import FoldConstants
from passes.fuse import Fuse
from passes.insert_casts import InsertCasts
from passes.manager import Pass
from passes.place_regions import PlaceRegions
from passes.select_kernels import SelectKernels
from passes.share_casts import ShareCasts

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        ChooseAccumulator, DecomposeAttention, DecomposeProducts, Annotate, FoldBatchnorm, InsertCasts, ShareCasts,
        Fuse, PlaceRegions, CancelCasts, SelectKernels, FoldConstants,
    )
}  # fmt: skip

PIPELINES: dict[str, str] = {
    "train": "choose-accumulator,decompose-attention,decompose-products,annotate,insert-casts,share-casts,"
    "place-regions{carriers=keep},cancel-casts,select-kernels,fold-constants{lifetime=step}",
    "infer": "choose-accumulator,decompose-attention,decompose-products,annotate,fold-batchnorm,insert-casts,"
    "share-casts,fuse,place-regions{carriers=drop},cancel-casts,select-kernels,fold-constants{lifetime=forever}",
}
"""By mode of lpcompile(), text that `passes.manager.parse_passes` reads."""

"""Architectures of transformers that are not in tests/zoo: small ones from their configs, with their default attention
and cache, unlike each other in what they multiply and how they come to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Batch = dict[str, Any]

_VOCABULARY = 97
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT: dict[str, Any] = {"vocab_size": _VOCABULARY, **_SIZES, **_IDS, "max_position_embeddings": 64}
_LANGUAGE: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """`make`: the model with fresh weights; `batch(seed)`: keyword arguments, another seed is another size."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    can_generate: bool = False
    tolerance: float = 0.0
    """0: bitwise equal to the original. Else as in the zoo: torch's LSTM kernel sums in another order."""


def _shape(seed: int) -> tuple[int, int]:
    return (2, 12) if seed == 0 else (3, 16)


def _tokens(seed: int) -> Batch:
    """Tokens with labels; the last row is padded on the right by a third."""
    rows, length = _shape(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, _VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - length // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _no_mask(seed: int) -> Batch:
    batch = _tokens(seed)
    del batch["attention_mask"]
    return {**batch, "labels": batch["input_ids"]}


def _no_labels(seed: int) -> Batch:
    batch = _tokens(seed)
    del batch["labels"]
    return batch


def _normal(*shape: int, key: str) -> Callable[[int], Batch]:
    """Of `shape` below the rows."""

    def batch(seed: int) -> Batch:
        return {key: torch.randn(_shape(seed)[0], *shape, generator=torch.Generator().manual_seed(seed))}

    return batch


def _sound(key: str, *before: int) -> Callable[[int], Batch]:
    def batch(seed: int) -> Batch:
        rows, length = _shape(seed)
        return {key: torch.randn(rows, *before, 100 * length, generator=torch.Generator().manual_seed(seed))}

    return batch


def _both(*parts: Callable[[int], Batch], **more: Any) -> Callable[[int], Batch]:
    def batch(seed: int) -> Batch:
        made: Batch = {}
        for part in parts:
            made |= part(seed)
        return {**made, **more}

    return batch


def _of(name: str, head: str = "ForCausalLM", **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**sizes)
        return getattr(transformers, f"{name}{head}")(config)

    return make


def _sequences(name: str, head: str = "ForConditionalGeneration", **more: Any) -> Callable[[], nn.Module]:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"vocab_size": _VOCABULARY, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    start = {"decoder_start_token_id": 2, "max_position_embeddings": 64, "forced_eos_token_id": None}
    return _of(name, head, **layers, **sizes, **start, **_IDS, **more)


def _vision_and_text(seed: int) -> Batch:
    """An image of 16 patches, 4 after merging, and the tokens that stand for them."""
    rows, length = _shape(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, length), generator=generator)
    ids[:, 1], ids[:, 2:6] = 92, 91
    pixels = torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=generator)
    kinds = (ids == 91).int()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "mm_token_type_ids": kinds,
        "labels": ids,
    }


def _qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    marks = {"image_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93, "video_token_id": 94}
    config = Qwen2VLConfig(text_config={**_LANGUAGE, "rope_parameters": rope}, vision_config=vision, **marks)
    return Qwen2VLForConditionalGeneration(config)


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    image = {**_SIZES, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=image, projection_dim=16))


_GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_SOUND = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
_STAGES = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
_PATCHES = {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}

ARCHITECTURES: dict[str, Architecture] = {
    # Text: encoder and decoder, biases of positions, latents, sinks, experts, states, hashes
    "bart": Architecture(_sequences("Bart"), _tokens, True),
    "bloom": Architecture(
        _of("Bloom", vocab_size=_VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_IDS), _tokens, True
    ),
    "deepseek_v3": Architecture(
        _of(
            "DeepseekV3",
            **{**_LANGUAGE, "num_key_value_heads": 4},
            **_GROUPS,
            **_LATENT,
            moe_intermediate_size=16,
            num_experts_per_tok=2,
        ),
        _tokens,
        True,
    ),
    "gpt_oss": Architecture(
        _of("GptOss", **_LANGUAGE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
        _tokens,
        True,
    ),
    "qwen3_next": Architecture(
        _of(
            "Qwen3Next",
            **_LANGUAGE,
            **_EXPERTS,
            **_DELTA,
            head_dim=8,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
        ),
        _tokens,
        True,
    ),
    "switch_transformers": Architecture(
        _of(
            "SwitchTransformers",
            "ForConditionalGeneration",
            vocab_size=_VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_sparse_encoder_layers=1,
            num_decoder_layers=2,
            num_sparse_decoder_layers=1,
            num_heads=4,
            num_experts=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        _tokens,
        True,
    ),
    "mamba2": Architecture(
        _of(
            "Mamba2",
            vocab_size=_VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=8,
            expand=2,
            state_size=8,
            n_groups=2,
            chunk_size=4,
            **_IDS,
        ),
        _tokens,
        True,
    ),
    "rwkv": Architecture(
        _of(
            "Rwkv",
            vocab_size=_VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            attention_hidden_size=32,
            intermediate_size=64,
        ),
        _no_mask,
        True,
    ),
    "recurrent_gemma": Architecture(
        _of(
            "RecurrentGemma",
            **{**_LANGUAGE, "num_key_value_heads": 1},
            attention_window_size=8,
            block_types=["recurrent", "attention"],
        ),
        _tokens,
        True,
    ),
    "jamba": Architecture(
        _of(
            "Jamba",
            **_LANGUAGE,
            num_experts=4,
            num_experts_per_tok=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        _tokens,
        True,
    ),
    "lfm2": Architecture(_of("Lfm2", **_LANGUAGE, layer_types=["conv", "full_attention"]), _tokens, True),
    "reformer": Architecture(
        _of(
            "Reformer",
            "ModelWithLMHead",
            vocab_size=_VOCABULARY,
            hidden_size=32,
            num_attention_heads=4,
            attn_layers=["local", "lsh"],
            local_attn_chunk_length=4,
            lsh_attn_chunk_length=4,
            num_buckets=4,
            num_hashes=1,
            is_decoder=True,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=2,
            hash_seed=1,
            attention_head_size=8,
            feed_forward_size=64,
            axial_pos_embds=False,
            hidden_dropout_prob=0.0,
            local_attention_probs_dropout_prob=0.0,
            lsh_attention_probs_dropout_prob=0.0,
        ),
        _no_mask,
    ),
    "deberta_v2": Architecture(
        _of("DebertaV2", "ForMaskedLM", **_TEXT, **_DISENTANGLED, share_att_key=True, conv_kernel_size=3), _tokens
    ),
    "xlnet": Architecture(
        _of("XLNet", "LMHeadModel", vocab_size=_VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64), _tokens
    ),
    "longformer": Architecture(_of("Longformer", "ForMaskedLM", **_TEXT, attention_window=4), _tokens),
    "fnet": Architecture(_of("FNet", "ForMaskedLM", **_TEXT), _no_mask),
    # Sound, video, images, series, both
    "wavlm": Architecture(
        _of(
            "WavLM",
            "Model",
            **_SIZES,
            **_SOUND,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            mask_time_prob=0.0,
        ),
        _sound("input_values"),
    ),
    "conformer": Architecture(
        _of(
            "Wav2Vec2Conformer",
            "Model",
            **_SIZES,
            **_SOUND,
            num_conv_pos_embeddings=16,
            mask_time_prob=0.0,
            num_conv_pos_embedding_groups=4,
            position_embeddings_type="relative",
        ),
        _sound("input_values"),
    ),
    "encodec": Architecture(
        _of(
            "Encodec",
            "Model",
            num_filters=4,
            hidden_size=16,
            codebook_size=16,
            codebook_dim=16,
            num_lstm_layers=1,
            upsampling_ratios=[4, 2],
            target_bandwidths=[18.0],
        ),
        _sound("input_values", 1),
        tolerance=1e-5,
    ),
    "videomae": Architecture(
        _of(
            "VideoMAE",
            "ForVideoClassification",
            **_SIZES,
            image_size=16,
            patch_size=8,
            num_frames=4,
            tubelet_size=2,
            num_labels=10,
        ),
        _normal(4, 3, 16, 16, key="pixel_values"),
    ),
    "segformer": Architecture(
        _of("Segformer", "ForSemanticSegmentation", **_STAGES, **_PATCHES, decoder_hidden_size=16, num_labels=10),
        _normal(3, 32, 32, key="pixel_values"),
    ),
    "levit": Architecture(
        _of(
            "Levit",
            "ForImageClassification",
            image_size=32,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 3, 4],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            mlp_ratio=[2, 2, 2],
            attention_ratio=[2, 2, 2],
            num_labels=10,
        ),
        _normal(3, 32, 32, key="pixel_values"),
    ),
    "patchtst": Architecture(
        _of(
            "PatchTST",
            "ForPrediction",
            num_input_channels=3,
            context_length=32,
            patch_length=8,
            patch_stride=4,
            d_model=16,
            num_attention_heads=4,
            ffn_dim=32,
            num_hidden_layers=2,
            prediction_length=4,
            loss="mse",
        ),
        _normal(32, 3, key="past_values"),
    ),
    "clip": Architecture(_clip, _both(_no_labels, _normal(3, 16, 16, key="pixel_values"), return_loss=True)),
    "qwen2_vl": Architecture(_qwen2_vl, _vision_and_text),
}

"""Llama of transformers: RoPE, RMSNorm, SwiGLU."""

from torch import nn

from launch.training.config import RunConfig


def llama(config: RunConfig, vocab: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # here: the import takes seconds

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            max_position_embeddings=config.context,
            hidden_size=config.width,
            intermediate_size=_swiglu_width(config.width),
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            attention_dropout=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    return model


def _swiglu_width(width: int) -> int:
    """8/3 of the width, up to a multiple of 16: three such matrices weigh as much as GPT-2's two of 4 widths."""
    return -(-8 * width // 3 // 16) * 16

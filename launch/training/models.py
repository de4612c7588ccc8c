"""Models: GPT-2 and Llama of transformers, built from a config alone. Nothing is fetched from a hub."""

import torch
from torch import nn

from launch.training.config import RunConfig


def build_model(config: RunConfig, vocab: int) -> nn.Module:
    """A fresh causal language model in `config.dtype`; the same seed gives the same weights on every rank.

    Called as `model(input_ids=x_BT).logits` (shape B, T, vocab). No dropout, so that runs under two policies differ in
    their numerics only.
    """
    torch.manual_seed(config.seed)
    model = _BUILDERS[config.model](config, vocab)
    return model.to(torch.bfloat16) if config.dtype == "bf16" else model


def _gpt(config: RunConfig, vocab: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # here: the import takes seconds

    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return model


def _llama(config: RunConfig, vocab: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

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


_BUILDERS = {"gpt": _gpt, "llama": _llama}
MODEL_NAMES = tuple(_BUILDERS)
"""Every model that `train` knows."""

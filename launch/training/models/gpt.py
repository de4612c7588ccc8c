"""GPT-2 of transformers."""

from torch import nn

from launch.training.config import RunConfig


def gpt(config: RunConfig, vocab: int) -> nn.Module:
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

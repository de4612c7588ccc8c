"""Models for tests: small enough for a CPU, shaped like the real ones. Each comes with a batch of keyword arguments."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 97
MODELS = ("gpt2-eager", "gpt2-sdpa", "llama-eager", "llama-sdpa", "resnet")


@dataclass(frozen=True)
class Example:
    """A model in train mode and a batch for it."""

    model: nn.Module
    batch: dict[str, Any]


def build(name: str, *, num_rows: int = 2, seed: int = 0) -> Example:
    """One of MODELS, with dropout where the real one has it."""
    torch.manual_seed(seed)
    family, _, attention = name.partition("-")
    if family == "resnet":
        return Example(TinyResNet().train(), image_batch(num_rows))
    model = tiny_gpt2(attention) if family == "gpt2" else tiny_llama(attention)
    return Example(model.train(), token_batch(num_rows))


def tiny_gpt2(attention: str = "eager", **options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
        attn_implementation=attention,
        **options,
    )
    return GPT2LMHeadModel(config)


def tiny_llama(attention: str = "eager", **options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
        attn_implementation=attention,
        **options,
    )
    return LlamaForCausalLM(config)


def token_batch(num_rows: int = 2, length: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """Tokens with labels; the last row is padded on the right by a third."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (num_rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, length - length // 3 :] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def image_batch(num_rows: int = 2, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixels": torch.randn(num_rows, 3, 16, 16, generator=generator),
        "labels": torch.randint(0, 10, (num_rows,), generator=generator),
    }


class TinyResNet(nn.Module):
    """A stem, two stages of one basic block, a classifier; returns the loss and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList([BasicBlock(8, 8, stride=1), BasicBlock(8, 16, stride=2)])
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(16, 10)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.stem(pixels)
        for stage in self.stages:
            x = stage(x)
        logits = self.fc(self.dropout(x.mean(dim=(2, 3))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class BasicBlock(nn.Module):
    def __init__(self, num_in: int, num_out: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut: nn.Module | None = None
        if num_in != num_out:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride=stride), nn.BatchNorm2d(num_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.shortcut is None else self.shortcut(x)
        return F.relu(y)

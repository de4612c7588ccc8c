"""The zoo: small models of every kind that a user brings, each with a batch that has padding and labels.

ZOO[name].make()           the model, with fresh weights
ZOO[name].batch(seed)      keyword arguments of its forward; another seed is another batch size and another length
run(model, batch)          one forward and backward: everything that came of it, by name
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Batch = dict[str, Any]

_VOCABULARY = 97
_SIZES = {"vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Model:
    """One model of the zoo. `num_sites`: calls of a function that multiplies matrices in one forward, counted at torch
    functions; `num_gemms`: products that the compiled model runs, more where one function holds several.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    num_sites: int
    num_gemms: int
    can_generate: bool = False
    can_checkpoint: bool = False
    tolerance: float = 0.0
    """0: bitwise equal to the original. Else the absolute and relative bound on outputs and gradients."""


def loss_of(output: Any) -> Tensor:
    return output["loss"]


def _shape(seed: int) -> tuple[int, int]:
    """Rows and length of batch `seed`."""
    return (2, 12) if seed == 0 else (3, 9)


def tokens(seed: int) -> Batch:
    """Tokens with labels; the last row is padded on the right by a third."""
    rows, length = _shape(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, _VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - length // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _images(size: int, key: str = "pixel_values") -> Callable[[int], Batch]:
    def batch(seed: int) -> Batch:
        rows, _ = _shape(seed)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 10, (rows,), generator=generator)
        return {key: torch.randn(rows, 3, size, size, generator=generator), "labels": labels}

    return batch


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"intermediate_size": 64, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **sizes, use_cache=False, attn_implementation="eager"))


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, **sizes, use_cache=False, attn_implementation="eager"))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": _VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ends, use_cache=False, attn_implementation="eager"))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"intermediate_size": 64, "max_position_embeddings": 64}
    return BertForMaskedLM(BertConfig(**_SIZES, **sizes, attn_implementation="eager"))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, decoder_start_token_id=0, use_cache=False, attn_implementation="eager")
    return T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    image = {"image_size": 16, "patch_size": 4, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(**sizes, **image, attn_implementation="eager"))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**_SIZES, **sizes, use_cache=False, attn_implementation="eager"))


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"vocab_size": _VOCABULARY, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8}
    lengths = {"max_source_positions": 16, "max_target_positions": 32}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(**layers, **sizes, **lengths, **ids, use_cache=False, attn_implementation="eager")
    return WhisperForConditionalGeneration(config)


def _speech(seed: int) -> Batch:
    rows, _ = _shape(seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_features": torch.randn(rows, 8, 32, generator=generator),
        "labels": tokens(seed)["labels"],
    }


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic", "num_labels": 10}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def _mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(
        MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=10, classifier_dropout_prob=0.0)
    )


def _swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "image_size": 16,
        "patch_size": 2,
        "window_size": 4,
    }
    return SwinForImageClassification(SwinConfig(**sizes, num_labels=10, attn_implementation="eager"))


def _mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**sizes, use_cache=False))


class TorchEncoder(nn.Module):
    """torch's own TransformerEncoder as a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, _VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class _Block(nn.Module):
    """Pre-norm attention with one projection for q, k and v, written with `@`, and a GELU MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(width / self.heads)
        weights = self.dropout(F.softmax(scores.masked_fill(mask == 0, float("-inf")), dim=-1))
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class NanoGPT(nn.Module):
    """A GPT with learned positions and a head tied to the embedding."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(_VOCABULARY, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList([_Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        mask = causal[None, None] & (attention_mask[:, None, None] != 0)
        x = self.tokens(input_ids) + self.positions(torch.arange(length))
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(self.norm(x))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class _BasicBlock(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or num_in != num_out:
            conv = nn.Conv2d(num_in, num_out, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(num_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y)


class ResNet18(nn.Module):
    """He et al. 2016, table 1, 18 layers; widths divided by 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        widths = [8, 8, 16, 32, 64]
        blocks = []
        for stage, (num_in, num_out) in enumerate(pairwise(widths)):
            blocks += [_BasicBlock(num_in, num_out, 1 if stage == 0 else 2), _BasicBlock(num_out, num_out, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(pixel_values))), 3, stride=2, padding=1)
        logits = self.fc(self.blocks(x).mean(dim=(2, 3)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class RecurrentLM(nn.Module):
    """Two layers of LSTM as a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(24, _VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x, _ = self.lstm(self.embedding(input_ids) * attention_mask[..., None])
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


_LANGUAGE = {"can_generate": True, "can_checkpoint": True}

ZOO: dict[str, Model] = {
    "llama": Model(_llama, tokens, 19, 19, **_LANGUAGE),
    "resnet18": Model(ResNet18, _images(32), 21, 21),
    "qwen3": Model(_qwen3, tokens, 19, 19, **_LANGUAGE),
    "gpt2": Model(_gpt2, tokens, 13, 13, **_LANGUAGE),
    "bert": Model(_bert, tokens, 18, 18, can_checkpoint=True),
    "t5": Model(_t5, tokens, 45, 45, **_LANGUAGE),
    "vit": Model(_vit, _images(16), 18, 18, can_checkpoint=True),
    "mixtral": Model(_mixtral, tokens, 19, 31, **_LANGUAGE),  # a grouped product of each of 4 layers: 4 experts
    "whisper": Model(_whisper, _speech, 47, 47, can_checkpoint=True),
    "resnet": Model(_resnet, _images(32), 11, 11),
    "mobilenet": Model(_mobilenet, _images(32), 53, 53),
    "swin": Model(_swin, _images(16), 35, 35, can_checkpoint=True),
    "mamba": Model(_mamba, tokens, 35, 35, **_LANGUAGE),  # a product per token
    "torch-encoder": Model(TorchEncoder, tokens, 7, 13),  # an attention holds four products
    "nanogpt": Model(NanoGPT, tokens, 13, 13),
    # An LSTM holds, per layer, one product over all 12 tokens and one per token. torch's kernel sums in another order.
    "lstm": Model(RecurrentLM, tokens, 2, 27, tolerance=1e-5),
}

NAMES = [pytest.param(name, marks=[] if name in ("llama", "resnet18") else pytest.mark.slow) for name in ZOO]
"""Parameters of a test over the zoo: a transformer and a convolutional network by default, the rest marked slow."""


def names(keep: Callable[[Model], bool]) -> list[Any]:
    """NAMES, where `keep` holds."""
    return [parameter for parameter in NAMES if keep(ZOO[str(parameter.values[0])])]


def build(name: str) -> nn.Module:
    """A model of the zoo with weights of its own seed."""
    torch.manual_seed(0)
    return ZOO[name].make()


def run(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The logits, the loss, every gradient and every buffer after one forward and backward.

    Fused attention runs as torch's math backend, which is what it is taken apart into.
    """
    torch.manual_seed(5)  # dropout
    model.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):
        output = model(**batch)
        loss_of(output).backward()
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return {"logits": output["logits"].detach(), "loss": loss_of(output).detach(), **gradients, **buffers}


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0) -> list[str]:
    """The names of what is not equal, bit for bit or within a tolerance."""
    assert found.keys() == wanted.keys()
    if tolerance:
        close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
        return [key for key in wanted if not torch.allclose(found[key], wanted[key], **close)]
    return [key for key in wanted if not torch.equal(found[key], wanted[key])]

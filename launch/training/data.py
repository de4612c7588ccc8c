"""Data: one corpus of tokens, and batches that are a pure function of (seed, step, micro-batch, rank).

    corpus bytes --90/10--> train | validation --tokenizer--> tokens --offsets drawn by hash--> x_BT, y_BT

Shapes: B windows per micro-batch, T = context tokens. y is x moved on by one token.
No state survives between steps, so a resumed run sees exactly the data that an uninterrupted one would have seen.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.training.config import ConfigError, RunConfig
from launch.training.images.packaged import PACKAGED

TRAIN_SHARE = 0.9


@dataclass(frozen=True)
class Corpus:
    """The tokens of a run. Invariant: both splits hold at least one window of `context + 1` tokens."""

    name: str  # what the text is, for people
    sha256: str  # of the whole text, in bytes
    content_sha256: str  # of the tokens, in their order: what a resumed run and the other ranks must have too
    train: Tensor  # int64 tokens
    validation: Tensor  # int64 tokens
    vocab: int  # number of token values
    bytes_per_token: float  # of the validation split: turns nats per token into nats per byte
    bigram: float  # nats per byte of the byte-bigram baseline on the validation split
    skipped: int = 0  # files of a folder left out because they are not UTF-8 text
    unit = "token"

    @property
    def bytes_per_unit(self) -> float:
        return self.bytes_per_token

    @property
    def sizes(self) -> dict[str, int]:
        return {"vocab": self.vocab}

    def units_per_row(self, config: RunConfig) -> int:
        return config.context

    def batch(self, config: RunConfig, step: int, micro: int, rank: int, world: int = 1) -> tuple[Tensor, Tensor]:
        """x_BT and y_BT of one micro-batch of one rank: windows are drawn, so it matters not among how many."""
        key = hashlib.blake2b(f"{config.seed}/{step}/{micro}/{rank}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
        starts_B1 = torch.randint(0, len(self.train) - config.context, (config.batch, 1), generator=generator)
        return _windows(self.train, starts_B1, config.context)

    def validation_batches(self, config: RunConfig, rank: int, world: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """x_BT, y_BT and how many of their windows count: as many batches on every rank, each window once.

        Windows follow one another without overlap and cover the split; the last ranks pad with windows that do not
        count, because ZeRO-3 gathers weights in every forward and needs all ranks in step.
        """
        windows = (len(self.validation) - 1) // config.context
        rounds = math.ceil(windows / (config.batch * world))
        for turn in range(rounds):
            first = (turn * world + rank) * config.batch
            counted = max(0, min(config.batch, windows - first))
            starts_B1 = torch.arange(first, first + config.batch).clamp(max=windows - 1).unsqueeze(1) * config.context
            yield (*_windows(self.validation, starts_B1, config.context), counted)


def load_corpus(config: RunConfig) -> Corpus:
    """The corpus a config names, split before tokenizing so that the byte baseline sees the same text."""
    name, raw, skipped = _read(config.data)
    cut = _utf8_boundary(raw, int(len(raw) * TRAIN_SHARE))
    head, tail = raw[:cut], raw[cut:]
    if config.tokenizer is None:
        train, validation, vocab = _bytes(head), _bytes(tail), 256
    else:
        tokenizer = load_tokenizer(config.tokenizer)
        train, validation, vocab = _encode(tokenizer, head), _encode(tokenizer, tail), len(tokenizer)
    if min(len(train), len(validation)) <= config.context:
        raise ConfigError(
            "this corpus is too short",
            where=name,
            expected=f"more than {config.context} tokens (--context) in each of its 90/10 splits",
            got=f"{len(train)} and {len(validation)}",
        )
    text_sha256 = hashlib.sha256(raw).hexdigest()
    return Corpus(
        name=name,
        sha256=text_sha256,
        content_sha256=text_sha256 if config.tokenizer is None else _tokens_sha256(train, validation),
        train=train,
        validation=validation,
        vocab=resolve_vocab(config.vocab, vocab),
        bytes_per_token=len(tail) / len(validation),
        bigram=bigram_loss(_bytes(head), _bytes(tail)),
        skipped=skipped,
    )


def check_data(config: RunConfig) -> str | None:
    """What the parent can say about the data without tokenizing it; of bytes the sha256 of the tokens."""
    _, raw, _ = _read(config.data)
    if config.tokenizer is None:
        shortest = min(int(len(raw) * TRAIN_SHARE), len(raw) - int(len(raw) * TRAIN_SHARE))
        if shortest <= config.context + 4:
            raise ConfigError(
                "this corpus is too short",
                where=str(config.data),
                expected=f"more than {config.context} tokens (--context) in each of its 90/10 splits",
                got=f"{len(raw)} bytes in all",
            )
        resolve_vocab(config.vocab, 256)
        return hashlib.sha256(raw).hexdigest()
    if not Path(config.tokenizer).is_dir():
        raise ConfigError(
            "there is no such folder",
            where=f"--tokenizer {config.tokenizer}",
            expected="a folder that save_pretrained of a transformers tokenizer wrote",
            got="a file" if Path(config.tokenizer).is_file() else "nothing of this name; names are not looked up",
        )
    return None


def resolve_vocab(asked: int | None, needed: int) -> int:
    """The vocabulary of the model: what was asked for if the tokens fit in it."""
    if asked is not None and asked < needed:
        raise ConfigError("the vocabulary is too small", where="vocab", expected=f"at least {needed}", got=str(asked))
    return asked or needed


def bigram_loss(train: Tensor, validation: Tensor) -> float:
    """Nats per byte of a byte-bigram model with add-one smoothing: -mean log((n(a,b) + 1) / (n(a) + 256)).

    `train` and `validation` are 1-D byte values 0..255; the mean runs over the pairs of `validation`.
    """
    pairs = torch.bincount(train[:-1].long() * 256 + train[1:].long(), minlength=256 * 256).reshape(256, 256).double()
    log_p = torch.log((pairs + 1) / (pairs.sum(dim=1, keepdim=True) + 256))
    return -log_p[validation[:-1].long(), validation[1:].long()].mean().item()


def load_tokenizer(folder: str) -> Any:
    """A transformers tokenizer from disk; nothing is fetched."""
    from transformers import AutoTokenizer  # here: the import takes seconds, and bytes need none of it

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError("this tokenizer cannot be loaded", where=f"--tokenizer {folder}", got=reason) from None


def _read(source: str | None) -> tuple[str, bytes, int]:
    """Name, text and number of skipped files."""
    if source is None:
        from pydoc_data.topics import topics

        return "Python's documentation (pydoc topics)", "\n\n".join(topics[key] for key in sorted(topics)).encode(), 0
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    try:
        return str(path), path.read_bytes(), 0
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        hint = "--model resnet or mobilenet, which read images" if source in PACKAGED else ""
        raise ConfigError("the corpus cannot be read", where=f"--data {source}", got=reason, hint=hint) from None


def _read_folder(folder: Path) -> tuple[str, bytes, int]:
    """Every visible UTF-8 file below a folder, in the order of their paths."""
    texts: list[bytes] = []
    skipped = 0
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        raw = file.read_bytes()
        try:
            raw.decode("utf-8")
            texts.append(raw)
        except UnicodeDecodeError:
            skipped += 1
    if not texts:
        raise ConfigError("this folder holds no UTF-8 text file", where=f"--data {folder}")
    return str(folder), b"\n\n".join(texts), skipped


def _windows(tokens: Tensor, starts_B1: Tensor, context: int) -> tuple[Tensor, Tensor]:
    block_BT = tokens[starts_B1 + torch.arange(context + 1)]
    return block_BT[:, :-1].contiguous(), block_BT[:, 1:].contiguous()


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() if raw else torch.empty(0, dtype=torch.long)


def _encode(tokenizer: Any, raw: bytes) -> Tensor:
    ids = tokenizer(raw.decode("utf-8", errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _tokens_sha256(*splits: Tensor) -> str:
    total = hashlib.sha256()
    for split in splits:
        total.update(split.numpy().tobytes())
    return total.hexdigest()


def _utf8_boundary(raw: bytes, cut: int) -> int:
    """The nearest position at or before `cut` that does not split a character (0b10xxxxxx continues one)."""
    while 0 < cut < len(raw) and raw[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut

"""Data: batches as a function of (seed, step, micro-batch, rank), whole validation, the bigram baseline."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from launch.training.config import ConfigError, RunConfig
from launch.training.data import Corpus, bigram_loss, check_data, load_corpus

SMALL = RunConfig(context=16, batch=3)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(SMALL)


def test_a_batch_depends_on_seed_step_micro_batch_and_rank_only(corpus: Corpus) -> None:
    torch.manual_seed(1)
    first = corpus.batch(SMALL, 5, 1, 0)
    torch.manual_seed(2)
    corpus.batch(SMALL, 9, 0, 1)
    again = corpus.batch(SMALL, 5, 1, 0)
    assert torch.equal(first[0], again[0])
    others = [
        corpus.batch(SMALL, 6, 1, 0),
        corpus.batch(SMALL, 5, 0, 0),
        corpus.batch(SMALL, 5, 1, 1),
        corpus.batch(SMALL.model_copy(update={"seed": 1}), 5, 1, 0),
    ]
    assert not any(torch.equal(first[0], other[0]) for other in others)


def test_targets_are_the_inputs_moved_on_by_one(corpus: Corpus) -> None:
    x_BT, y_BT = corpus.batch(SMALL, 0, 0, 0)
    assert x_BT.shape == y_BT.shape == (3, 16)
    assert torch.equal(x_BT[:, 1:], y_BT[:, :-1])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_sees_each_window_once_and_keeps_ranks_in_step(corpus: Corpus, world: int) -> None:
    seen: Counter[tuple[int, ...]] = Counter()
    rounds = []
    for rank in range(world):
        batches = list(corpus.validation_batches(SMALL, rank, world))
        rounds.append(len(batches))
        for x_BT, _, counted in batches:
            assert x_BT.shape == (3, 16)
            seen.update(tuple(row.tolist()) for row in x_BT[:counted])
    windows = (len(corpus.validation) - 1) // 16
    expected = Counter(tuple(corpus.validation[i * 16 : i * 16 + 16].tolist()) for i in range(windows))
    assert len(set(rounds)) == 1
    assert seen == expected


def test_bigram_by_hand() -> None:
    # train "abab": n(a,b) = 2, n(b,a) = 1; validation "aba": pairs ab, ba
    train, validation = torch.tensor([97, 98, 97, 98]), torch.tensor([97, 98, 97])
    expected = -(math.log(3 / 258) + math.log(2 / 257)) / 2
    assert bigram_loss(train, validation) == pytest.approx(expected, rel=1e-12)


def test_bigram_equals_a_counting_loop(corpus: Corpus) -> None:
    train, validation = corpus.train[:5000], corpus.validation[:500]
    counts, totals = Counter(zip(train.tolist(), train.tolist()[1:])), Counter(train.tolist()[:-1])
    pairs = list(zip(validation.tolist(), validation.tolist()[1:]))
    expected = -sum(math.log((counts[a, b] + 1) / (totals[a] + 256)) for a, b in pairs) / len(pairs)
    assert bigram_loss(train, validation) == pytest.approx(expected, rel=1e-12)


def test_a_folder_is_its_utf8_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second " * 50)
    (tmp_path / "a.txt").write_text("first é " * 50)
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\xff")
    (tmp_path / ".hidden").write_text("no")
    corpus = load_corpus(SMALL.model_copy(update={"data": str(tmp_path)}))
    text = bytes(torch.cat([corpus.train, corpus.validation]).tolist()).decode()
    assert text == "first é " * 50 + "\n\n" + "second " * 50
    assert corpus.skipped == 1


def test_a_tokenizer_from_disk(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "blue": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("red blue " * 200)
    paths = {"data": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path / "tokenizer")}
    corpus = load_corpus(SMALL.model_copy(update=paths))
    assert corpus.vocab == 3
    assert set(corpus.train.tolist()) == {1, 2}
    assert corpus.bytes_per_token == pytest.approx(4.5, rel=0.05)


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        ({"data": "no-such-file"}, "the corpus cannot be read"),
        ({"vocab": 100}, "the vocabulary is too small. Expected at least 256. Got 100"),
        ({"tokenizer": "no-such-folder"}, "there is no such folder"),
        ({"context": 400000}, "this corpus is too short"),
    ],
)
def test_refuses_with_a_sentence(update: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_data(SMALL.model_copy(update=update))

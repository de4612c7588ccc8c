"""Image sets: batches as a function of (seed, step, micro-batch, rank), every epoch a permutation, validation whole."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from launch.training.config import ConfigError, RunConfig
from launch.training.images.image_set import ImageSet, crop_and_flip, load_images
from launch.training.images.source import Source, in_memory, stratified

SMALL = RunConfig(model="resnet", batch=4)


def numbered(count: int, size: int = 4) -> Tensor:
    """uint8 pictures whose every pixel is their number."""
    return torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(count, 2, size, size).contiguous()


def image_set(train: int = 20, validation: int = 11) -> ImageSet:
    splits = [in_memory(numbered(count), torch.arange(count)) for count in (train, validation)]
    source = Source("numbers", "0" * 64, splits[0], splits[1], train, 2, 4)
    return ImageSet(source, torch.zeros(2), torch.ones(2))


def test_a_batch_depends_on_seed_step_micro_batch_and_rank_only() -> None:
    images = image_set()
    torch.manual_seed(1)
    first = images.batch(SMALL, 5, 0, 0, 2)
    torch.manual_seed(2)
    images.batch(SMALL, 9, 0, 1, 2)
    again = images.batch(SMALL, 5, 0, 0, 2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], images.batch(SMALL, 5, 0, 1, 2)[1])
    assert not torch.equal(first[1], images.batch(SMALL.model_copy(update={"seed": 1}), 5, 0, 0, 2)[1])


def test_labels_are_those_of_the_pictures() -> None:
    x_BCHW, y_B = image_set().batch(SMALL, 3, 0, 0)
    assert x_BCHW.shape == (4, 2, 4, 4)
    assert torch.equal(x_BCHW[:, 0, 0, 0].long(), y_B)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_every_epoch_is_a_permutation_over_ranks_and_micro_batches(world: int, accumulation: int) -> None:
    config = SMALL.model_copy(update={"grad_accumulation": accumulation})
    images, seen = image_set(train=20), list[int]()
    while len(seen) < 60:
        step = len(seen) // (4 * accumulation * world)
        for micro in range(accumulation):
            for rank in range(world):
                seen += images.batch(config, step, micro, rank, world)[1].tolist()
    epochs = [seen[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs), "also of batches that end in the next epoch"
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_sees_each_picture_once_and_keeps_ranks_in_step(world: int) -> None:
    seen: Counter[int] = Counter()
    rounds = []
    for rank in range(world):
        batches = list(image_set().validation_batches(SMALL, rank, world))
        rounds.append(len(batches))
        for x_BCHW, y_B, counted in batches:
            assert len(x_BCHW) == len(y_B) == 4
            seen.update(y_B[:counted].tolist())
    assert seen == Counter(range(11))
    assert len(set(rounds)) == 1


def test_pixels_have_mean_0_and_deviation_1(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (50, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    pixels[:, 2] = 7
    split = in_memory(pixels, torch.arange(50) % 2)
    source = Source("random", "0" * 64, split, split, 2, 3, 4)
    monkeypatch.setattr("launch.training.images.image_set._source", lambda config: source)
    images = load_images(SMALL)
    x = torch.cat([images.batch(SMALL.model_copy(update={"batch": 50}), 0, 0, 0)[0]])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0)


def test_crop_and_flip_moves_and_mirrors() -> None:
    """Each picture equals one of the moves of its own pixels, and all moves and both sides come about."""
    picture = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8)
    many = crop_and_flip(picture.expand(400, 1, 8, 8), torch.Generator().manual_seed(0))
    padded = torch.zeros(1, 10, 10, dtype=torch.uint8)
    padded[:, 1:9, 1:9] = picture[0]
    moves = [padded[:, top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
    possible = {tuple(each.flatten().tolist()) for move in moves for each in (move, move.flip(-1))}
    assert {tuple(each.flatten().tolist()) for each in many} == possible


def test_augmented_batches_are_a_function_of_the_step_too() -> None:
    config = SMALL.model_copy(update={"augment": "crop-flip"})
    first, again = image_set().batch(config, 2, 0, 0)[0], image_set().batch(config, 2, 0, 0)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, image_set().batch(SMALL, 2, 0, 0)[0])


def test_a_split_holds_the_same_share_of_every_class() -> None:
    labels_N = torch.arange(300) % 3
    train, validation = stratified(labels_N, 60)
    assert [int((labels_N[train] == label).sum()) for label in range(3)] == [20, 20, 20]
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(300))
    assert torch.equal(stratified(labels_N, 60)[0], train)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("digit", r'--data digit: these images are not known. Did you mean "digits"\?'),
        ("no-such-folder", "expected digits, mnist, a folder of CIFAR-10's batches"),
    ],
)
def test_refuses_with_a_sentence(data: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?i){sentence}"):
        load_images(SMALL.model_copy(update={"data": data}))

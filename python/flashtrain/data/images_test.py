"""Labeled images: splits, order, augmentation, folders."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashtrain.data.errors import DataError
from flashtrain.data.image_folder import ImageFolder
from flashtrain.data.images import DigitsDataset, load_images


@pytest.fixture(scope="module")
def digits() -> DigitsDataset:
    return DigitsDataset(seed=1)


def test_digits_are_split_by_class(digits):
    images, labels = zip(*digits.val_batches(100), strict=True)
    assert [len(part) for part in images] == [100, 100, 100, digits.num_val - 300]
    val = torch.cat(images)
    assert val.dtype == torch.uint8
    assert val.shape[1:] == (1, 8, 8)
    assert (val.amin(), val.amax()) == (0, 255)
    from sklearn.datasets import load_digits

    counts = torch.cat(labels).bincount(minlength=10)
    assert torch.equal(counts, torch.from_numpy(np.bincount(load_digits().target) // 5))
    assert digits.num_train + digits.num_val == 1797
    # The split is no matter of the seed.
    other = torch.cat([batch for batch, _ in DigitsDataset(seed=2).val_batches(500)])
    assert torch.equal(other, val)


def test_ranks_share_what_one_process_sees(digits):
    images, labels = digits.train_samples(5_000, 64)
    shares = [digits.train_samples(5_000, 64, rank=rank, world_size=4) for rank in range(4)]
    assert torch.equal(torch.cat([part for part, _ in shares]), images)
    assert torch.equal(torch.cat([part for _, part in shares]), labels)
    whole = [batch for batch, _ in digits.val_batches(50)]
    turns = [[b for b, _ in digits.val_batches(50, rank=r, world_size=3)] for r in range(3)]
    for i, batch in enumerate(whole):
        assert torch.equal(turns[i % 3][i // 3], batch)
    assert sum(map(len, turns)) == len(whole)
    with pytest.raises(DataError, match="a batch of 10 is not a multiple of world_size=4"):
        digits.train_samples(0, 10, world_size=4)


def test_an_epoch_has_every_image_once(digits):
    first, _ = digits.sample_indices(0, digits.num_train)
    second, epochs = digits.sample_indices(digits.num_train, digits.num_train)
    for indices in (first, second):
        assert np.array_equal(np.sort(indices), np.arange(digits.num_train))
    assert (epochs == 1).all()
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, DigitsDataset(seed=2).sample_indices(0, digits.num_train)[0])


def test_digits_move_by_at_most_a_pixel(digits):
    """All places are about equally frequent, and an image's place changes with the epoch."""
    originals, _ = digits._train
    counts, places = np.zeros((3, 3), int), []
    for epoch in range(2):
        start = epoch * digits.num_train
        images, labels = digits.train_samples(start, digits.num_train)
        indices, _ = digits.sample_indices(start, digits.num_train)
        assert torch.equal(labels, digits._train[1][torch.from_numpy(indices)])
        of_image = {}
        for image, index in zip(images, indices, strict=True):
            padded = torch.nn.functional.pad(originals[index], (1, 1, 1, 1))
            matches = [
                (down, right)
                for down in range(3)
                for right in range(3)
                if torch.equal(padded[:, down : down + 8, right : right + 8], image)
            ]
            assert len(matches) == 1, index
            counts[matches[0]] += 1
            of_image[index] = matches[0]
        places.append(of_image)
    expected = 2 * digits.num_train / 9
    assert (abs(counts - expected) < 5 * np.sqrt(expected)).all()
    moved = sum(places[0][i] != places[1][i] for i in places[0])
    assert moved > 0.8 * digits.num_train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ""}, "data.source='' holds no labelled images"),
        ({"source": "digit"}, "did you mean 'digits'"),
        ({"source": "digits", "image_size": 9}, "digits are 8 x 8 pixels"),
        ({"source": "digits", "seed": -1}, r"data.seed=-1 must be in \[0, 2\*\*64\)"),
    ],
)
def test_unusable_sources_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        load_images(**{"seed": 0, **options})


def write_folder(folder: Path, size: tuple[int, int] = (40, 30)) -> None:
    """Two classes: dark and bright images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, level in (("bright", 180), ("dark", 20)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level, level + 50, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    (folder / "train" / "dark" / "notes.txt").write_text("no image")


def test_without_torchvision_folders_are_refused_by_one_line(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match="image folders need torchvision") as refusal:
        load_images(str(tmp_path), seed=0)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def no_torchvision_check(monkeypatch):
    """The steps before an image is decoded need none."""
    monkeypatch.setattr("flashtrain.data.image_folder._check_torchvision", lambda: None)


def test_folders_are_read_in_order(tmp_path, no_torchvision_check):
    write_folder(tmp_path)
    folder = ImageFolder(tmp_path, seed=0, image_size=16)
    assert folder.classes == ["bright", "dark"]
    assert (folder.num_classes, folder.num_train, folder.num_val) == (2, 12, 6)
    assert folder.name(6) == str(tmp_path / "train" / "dark" / "0.png")


_DEADLY_TORCHVISION = """
import os, signal

class Compose:
    def __init__(self, parts):
        pass

    def __call__(self, image):
        os.kill(os.getpid(), signal.SIGKILL)

def __getattr__(name):
    return lambda *arguments, **options: None
"""


def test_a_killed_process_is_one_line(tmp_path, monkeypatch, no_torchvision_check):
    write_folder(tmp_path / "images")
    stub = tmp_path / "modules" / "torchvision" / "transforms"
    stub.mkdir(parents=True)
    (stub / "v2.py").write_text(_DEADLY_TORCHVISION)
    for package in (stub, stub.parent):
        (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "modules")  # which new processes inherit
    folder = ImageFolder(tmp_path / "images", seed=0, image_size=16, workers=2)
    try:
        with pytest.raises(DataError, match="images was killed; the machine may be out of memory"):
            folder.train_samples(0, 12)
    finally:
        folder.close()


def test_unusable_folders_are_refused(tmp_path, no_torchvision_check):
    def refusal() -> str:
        with pytest.raises(DataError) as caught:
            load_images(str(tmp_path), seed=0)
        return str(caught.value)

    assert f"{tmp_path / 'train'} is no folder" in refusal()
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert f"{tmp_path / 'val'} is no folder" in refusal()
    (tmp_path / "val" / "dog").mkdir(parents=True)
    assert "val has the class 'dog'" in refusal()
    (tmp_path / "train" / "dog").mkdir()
    assert f"{tmp_path / 'train'} holds no images" in refusal()


def test_images_are_decoded_and_augmented(tmp_path):
    pytest.importorskip("torchvision")
    write_folder(tmp_path)
    folder, again = (ImageFolder(tmp_path, seed=3, image_size=16, workers=w) for w in (1, 3))
    try:
        images, labels = folder.train_samples(0, 12)
        assert images.shape == (12, 3, 16, 16)
        assert images.dtype == torch.uint8
        assert sorted(labels.tolist()) == [0] * 6 + [1] * 6
        same, _ = again.train_samples(0, 12)
        assert torch.equal(same, images)  # on any number of processes
        half, _ = again.train_samples(0, 12, rank=1, world_size=2)
        assert torch.equal(half, images[6:])
        later, _ = folder.train_samples(12, 12)
        assert not torch.equal(later, images)
        [(val, val_labels)] = list(folder.val_batches(6))
        assert val_labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert (val[:3].float().mean((1, 2, 3)) > 170).all()
        assert (val[3:].float().mean((1, 2, 3)) < 80).all()
        broken = tmp_path / "val" / "dark" / "2.png"
        broken.write_bytes(broken.read_bytes()[:60])
        with pytest.raises(DataError, match=f"{broken} cannot be read as an image"):
            list(folder.val_batches(6))
    finally:
        folder.close()
        again.close()

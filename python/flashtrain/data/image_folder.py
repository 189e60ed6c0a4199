"""Folders of labeled images in ImageNet's layout: <split>/<class>/<image>, splits train and val.

Images are decoded and augmented by torchvision in processes of their own. In training: a random
crop of 8% to 100% of the area, mirrored half of the time, then RandAugment (Cubuk et al. 2020) with
two operations of magnitude 9. In validation: the middle 7/8 of the image.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashtrain.data.errors import DataError, cannot_read
from flashtrain.data.images import ImageDataset
from flashtrain.data.workers import die_with_parent

_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")

_transforms: dict[str, Callable[[Any], Any]] = {}  # of a worker process


class ImageFolder(ImageDataset):
    """Classes are the folders of train/, in alphabetical order.

    Args:
        folder: holds train/ and val/.
        seed: of order and augmentation.
        image_size: height and width that images are brought to.
        workers: processes that decode, 0: one for each CPU core that this process may use.

    Raises:
        DataError: the folder holds no such images, or torchvision is not installed.
    """

    num_channels = 3

    def __init__(self, folder: Path, *, seed: int, image_size: int, workers: int = 0):
        super().__init__(seed)
        _check_torchvision()
        self.image_size = image_size
        self.classes = _class_names(folder)
        self.num_classes = len(self.classes)
        self._files = {split: _files(folder, split, self.classes) for split in ("train", "val")}
        self.num_train, self.num_val = (len(files) for files, _ in self._files.values())
        self._workers = workers or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def _images(self, split: str, indices: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        if self._pool is None:
            # Not forked: this process may hold threads and a GPU. Not multiprocessing's Pool, which
            # waits forever for the work of a process that was killed.
            self._pool = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self.image_size,),
            )
        files, labels = self._files[split]
        jobs = [
            (split, files[index], (self.seed, int(epoch), int(index)))
            for index, epoch in zip(indices, epochs, strict=True)
        ]
        try:
            images = list(self._pool.map(_load, *zip(*jobs), chunksize=max(1, len(jobs) // 64)))
        except (BrokenProcessPool, BrokenPipeError) as error:
            raise DataError(
                "a process that decodes images was killed; the machine may be out of memory"
                " (--config.data.workers=<n> takes fewer processes)"
            ) from error
        return torch.from_numpy(np.stack(images)), torch.from_numpy(labels[indices])

    def _train_images(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._images("train", indices, epochs)

    def _val_images(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._images("val", indices, np.zeros_like(indices))

    def name(self, index: int) -> str:
        """The image's path."""
        return self._files["train"][0][index]

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _check_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # its operators may not fit this torch
        raise DataError(
            f"image folders need torchvision, which cannot be imported here ({error}); run with an "
            "interpreter that has one for its torch, as in --config=site_packages, or train on "
            "data.source=digits"
        ) from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise cannot_read(folder, error) from error


def _class_names(folder: Path) -> list[str]:
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            raise DataError(
                f"{folder / split} is no folder; expected are {folder}/train/<class>/<image> and "
                f"{folder}/val/<class>/<image>: set DATA_DIR or --config.data.path"
            )
    names = [entry.name for entry in _entries(folder / "train") if entry.is_dir()]
    strangers = [
        entry.name
        for entry in _entries(folder / "val")
        if entry.is_dir() and entry.name not in names
    ]
    if strangers:
        raise DataError(
            f"{folder}/val has the class {strangers[0]!r}, which {folder}/train has not; both must "
            "have the same folders"
        )
    return names


def _files(folder: Path, split: str, classes: list[str]) -> tuple[list[str], np.ndarray]:
    """(paths of a split's images in order, their labels int64)."""
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        path = folder / split / name
        found = [
            entry
            for entry in (_entries(path) if path.is_dir() else ())
            if entry.name.lower().endswith(_SUFFIXES)
        ]
        for entry in found:
            if not entry.is_file():  # a pipe may never end
                raise DataError(f"{entry.path} has the name of an image, but is no file")
        files += [entry.path for entry in found]
        labels += [label] * len(found)
    if not files:
        raise DataError(
            f"{folder / split} holds no images in folders of classes; known suffixes: "
            + ", ".join(_SUFFIXES)
        )
    return files, np.array(labels, np.int64)


# --- In the worker processes ----------------------------------------------------------------------


def _start_worker(image_size: int) -> None:
    from torchvision.transforms import v2

    die_with_parent()
    torch.set_num_threads(1)
    _transforms["train"] = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9),
        ]
    )
    _transforms["val"] = v2.Compose(
        [v2.Resize(round(image_size * 8 / 7), antialias=True), v2.CenterCrop(image_size)]
    )


def _load(split: str, file: str, key: tuple[int, int, int]) -> np.ndarray:
    """One image, uint8 [3, I, I]; `key` decides how it is altered."""
    from PIL import Image

    # Python's hash of a tuple of integers is the same in every process.
    torch.manual_seed(hash(key))
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # each format has its own
        raise DataError(
            f"{file} cannot be read as an image: {error or type(error).__name__}; repair or"
            " replace it"
        ) from None
    return np.asarray(_transforms[split](image)).transpose(2, 0, 1)

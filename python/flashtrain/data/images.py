"""Labeled images as training and validation read them.

The order of training is a pure function of seed and sample number, as for tokens (dataset.py), and
so is each sample's augmentation: an image of epoch e is altered by random numbers that depend on
the seed, e and the image alone.

Legend: B batch, C channels, I image height and width.
"""

import abc
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from flashtrain.data.errors import DataError
from flashtrain.data.permutation import Permutation

_MOVES_STREAM = 2**63  # permutations of other streams order the epochs


class ImageDataset(abc.ABC):
    """Batches of (images, labels): uint8 [B, C, I, I] and int64 [B], on the CPU.

    Attributes:
        num_classes: labels are 0..num_classes-1.
        num_channels, image_size: of the images.
        num_train, num_val: images of the splits.
    """

    num_classes: int
    num_channels: int
    image_size: int
    num_train: int
    num_val: int

    def __init__(self, seed: int):
        if not 0 <= seed < 2**64:
            raise DataError(f"data.seed={seed} must be in [0, 2**64)")
        self.seed = seed

    @abc.abstractmethod
    def _train_images(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        """Training images with the augmentation of their epochs."""

    @abc.abstractmethod
    def _val_images(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Validation images."""

    def train_samples(
        self, first_sample: int, count: int, *, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The rank's slice of consecutive samples of the run.

        Samples are numbered through the run; each epoch is another permutation of all images.

        Raises:
            DataError: count is not a multiple of world_size.
        """
        if count % world_size:
            raise DataError(f"a batch of {count} is not a multiple of world_size={world_size}")
        share = count // world_size
        return self._train_images(*self.sample_indices(first_sample + rank * share, share))

    def sample_indices(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(images of the training split, epochs) of consecutive samples, both int64 [count]."""
        samples = first_sample + np.arange(count, dtype=np.int64)
        epochs, positions = np.divmod(samples, self.num_train)
        indices = np.empty_like(samples)
        for epoch in np.unique(epochs):
            permutation = Permutation(self.num_train, self.seed, stream=int(epoch))
            indices[epochs == epoch] = permutation(positions[epochs == epoch])
        return indices, epochs

    def name(self, index: int) -> str:
        """The name of a training image in messages."""
        return f"image {index}"

    def val_batches(
        self, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole validation split in order, shared by ranks; the last batch may be smaller."""
        for i, start in enumerate(range(0, self.num_val, batch_size)):
            if i % world_size == rank:
                yield self._val_images(np.arange(start, min(start + batch_size, self.num_val)))


class DigitsDataset(ImageDataset):
    """The 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels.

    A fifth of each class, drawn with a fixed seed, is the validation split. In training a digit is
    moved by up to one pixel each way.

    Source: E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998.
    """

    num_classes = 10
    num_channels = 1
    image_size = 8

    _SPLIT_SEED = 2357

    def __init__(self, *, seed: int):
        super().__init__(seed)
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Values are 0..16.
        pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
        images, labels = torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(digits.target)
        is_val = self._validation_mask(digits.target)
        self._train = images[~is_val], labels[~is_val].long()
        self._val = images[is_val], labels[is_val].long()
        self.num_train, self.num_val = len(self._train[0]), len(self._val[0])

    def _validation_mask(self, labels: np.ndarray) -> Tensor:
        rng = np.random.RandomState(self._SPLIT_SEED)  # its stream is frozen for good
        is_val = np.zeros(len(labels), bool)
        for label in range(self.num_classes):
            members = rng.permutation(np.flatnonzero(labels == label))
            is_val[members[: len(members) // 5]] = True
        return torch.from_numpy(is_val)

    def _train_images(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        images, labels = (part[torch.from_numpy(indices)] for part in self._train)
        places = np.empty_like(indices)  # 0..8, of the 3 x 3 that an image may be moved to
        for epoch in np.unique(epochs):
            draw = Permutation(self.num_train, self.seed, stream=_MOVES_STREAM + int(epoch))
            places[epochs == epoch] = draw(indices[epochs == epoch]) % 9
        down, right = (torch.from_numpy(part) for part in np.divmod(places, 3))
        windows = functional.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
        return windows[torch.arange(len(images)), :, down, right], labels

    def _val_images(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        images, labels = self._val
        return images[torch.from_numpy(indices)], labels[torch.from_numpy(indices)]


def load_images(
    path: str | None = None,
    *,
    source: str | None = None,
    seed: int,
    image_size: int = 0,
    workers: int = 0,
) -> ImageDataset:
    """Opens labeled images.

    Args:
        path: an image folder, see `ImageFolder`; where it is empty or None, `source` decides.
        source: "digits", or "imagenet", an image folder in ${DATA_DIR}/imagenet.
        seed: of order and augmentation.
        image_size: height and width that a folder's images are brought to, 0: 224.
        workers: processes that decode a folder's images, 0: one for each CPU core.

    Raises:
        DataError: nothing usable is there; the message says what to do.
    """
    from flashtrain.data.image_folder import ImageFolder
    from flashtrain.data.paths import cache_dir, user_path
    from flashtrain.errors import did_you_mean

    if path:
        folder = user_path(path)
    elif source == "digits":
        if image_size not in (0, DigitsDataset.image_size):
            raise DataError(f"image_size={image_size}: digits are 8 x 8 pixels; leave it 0")
        return DigitsDataset(seed=seed)
    elif source == "imagenet":
        folder = cache_dir(source)
    else:
        raise DataError(
            f"data.source={source!r} holds no labelled images; "
            + did_you_mean(source or "", ("digits", "imagenet"))
            + " (or set --config.data.path to an image folder)"
        )
    return ImageFolder(folder, seed=seed, image_size=image_size or 224, workers=workers)

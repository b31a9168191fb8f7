"""Images by data set name: in memory as uint8 tensors, augmented in batches; image folders stream from disk.

Everything random is a function of a seed alone: subsets, drawn images, order and augmentation.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from dnr_plugin.errors import InputError, first_line
from dnr_plugin.schema import DataOptions

AUGMENTATIONS = ("flip", "crop", "cutout")
SHAPES = (
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "cross",
    "plus",
    "horizontal stripes",
    "vertical stripes",
    "checkerboard",
)

# Images in the train and test split as published: what train_size and test_size may ask for.
_SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "mnist": (60_000, 10_000)}
_DRAWN = (5_000, 1_000)  # shapes, unless train_size and test_size say otherwise
_FILES = {
    "cifar10": ("cifar-10-batches-py", (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")),
    "cifar100": ("cifar-100-python", ("train", "test", "meta")),
    "mnist": ("MNIST/raw", tuple(f"{s}-{k}-ubyte" for s in ("train", "t10k") for k in ("images-idx3", "labels-idx1"))),
}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageSource(Protocol):
    """What training and observing need of a data set; ``Images`` and ``FolderImages`` have it."""

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> ImageSource:
        """The same images, whose batches lie on ``device``."""
        ...

    def batches(
        self, batch_size: int, *, seed: int | None = None, augment: Sequence[str] = (), drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the images.

        Args:
            batch_size: images per batch, >= 1.
            seed: shuffles and augments, and nothing else does: the same seed gives the same batches. None: in order.
            augment: any of ``flip``, ``crop``, ``cutout``; needs a seed. Their order does not matter.
            drop_last: leave out a last batch that is not full.

        Returns:
            Pairs of normalised images, float32 [B, C, H, W], and labels, int64 [B], on the device.

        Raises:
            ValueError: batch_size below 1, unknown augmentation, or augmentation without a seed.
        """
        ...


@dataclass(frozen=True)
class Data:
    """A data set, split for training and testing.

    Attributes:
        train, test: the images; both are normalised by the training images' statistics.
        num_classes: labels lie in [0, num_classes).
        in_channels: channels of every image.
        image_size: side of every image in pixels.
        classes: a name for each label.
    """

    train: ImageSource
    test: ImageSource
    num_classes: int
    in_channels: int
    image_size: int
    classes: list[str]


def derive_seed(seed: int, *path: int | str) -> int:
    """A seed for one purpose of a run, in [0, 2**63): ``derive_seed(seed, "train", epoch)``.

    Neighbouring seeds and paths give unrelated streams, which ``seed + epoch`` would not.
    """
    text = "/".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# --- augmentation: pure functions on normalised batches -----------------------------------------------------------


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror left and right where ``mirrored``, bool [B], is true; images: [B, C, H, W]."""
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Pad with zeros on every side and cut each image back to its size at its own place.

    Args:
        images: [B, C, H, W].
        top: first row of each crop in the padded image, int64 [B], in [0, 2 * padding].
        left: first column, likewise.
        padding: rows and columns of zeros on each side, >= 0.

    Returns:
        [B, C, H, W].
    """
    height, width = images.shape[2:]
    windows = functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def cutout(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Set a square to zero, clipped at the borders.

    Args:
        images: [B, C, H, W].
        row: int64 [B], in [0, H); the square covers rows ``row - side // 2`` to ``row - side // 2 + side - 1``.
        column: likewise.
        side: of the square in pixels, >= 0.

    Returns:
        [B, C, H, W].
    """

    def covered(centre: Tensor, size: int) -> Tensor:
        offset = torch.arange(size, device=images.device) - (centre[:, None] - side // 2)
        return (offset >= 0) & (offset < side)

    inside = covered(row, images.shape[2])[:, None, :, None] & covered(column, images.shape[3])[:, None, None, :]
    return images.masked_fill(inside, 0.0)


def _augment(images: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """Apply ``names`` with draws from a CPU generator, so that every device sees the same augmentation."""
    count, size, device = len(images), images.shape[2], images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator).to(device)

    if "flip" in names:
        images = flip(images, draw(2).bool())
    if "crop" in names:
        padding = size // 8
        images = crop(images, draw(2 * padding + 1), draw(2 * padding + 1), padding)
    if "cutout" in names:
        images = cutout(images, draw(size), draw(size), size // 2)
    return images


def _check_batches(batch_size: int, seed: int | None, augment: Sequence[str]) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    if unknown := [name for name in augment if name not in AUGMENTATIONS]:
        raise ValueError(f"augment: expected any of {', '.join(AUGMENTATIONS)}, found {', '.join(unknown)}")
    if augment and seed is None:
        raise ValueError("augment: expected a seed to draw from, found None")


# --- images in memory ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images in memory; see :class:`ImageSource` for what its methods do.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        mean: float32 [C], of pixels in [0, 1]; subtracted.
        std: float32 [C], likewise; divided by.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Images:
        return Images(self.images.to(device), self.labels.to(device), self.mean.to(device), self.std.to(device))

    def batches(
        self, batch_size: int, *, seed: int | None = None, augment: Sequence[str] = (), drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        _check_batches(batch_size, seed, augment)  # here, as the generator below would wait for its first batch
        return self._batches(batch_size, seed, augment, drop_last)

    def _batches(
        self, batch_size: int, seed: int | None, augment: Sequence[str], drop_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        order = None
        if seed is not None:
            order = torch.randperm(len(self), generator=generator.manual_seed(seed)).to(self.images.device)
        last = len(self) - len(self) % batch_size if drop_last else len(self)
        for start in range(0, last, batch_size):
            rows = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
            images = _normalise(self.images[rows], self.mean, self.std)
            yield _augment(images, augment, generator), self.labels[rows]

    def subset(self, size: int, seed: int) -> Images:
        """``size`` images drawn without replacement, in their original order; size in [1, len(self)]."""
        rows = _drawn_rows(len(self), size, seed).to(self.images.device)
        return replace(self, images=self.images[rows], labels=self.labels[rows])


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, C, H, W] in [0, 255] to float32 of about zero mean and unit variance in each channel."""
    return images.float().div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def _drawn_rows(count: int, size: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size].sort().values


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images, in units of 255; float32 [C] each.

    Exact, from counts of the 256 values, so that no float copy of the data set is made. A constant channel has
    standard deviation 1 / 255, as it is divided by.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().clamp(min=1 / 255).float()


# --- loading ------------------------------------------------------------------------------------------------------


def check_data(options: DataOptions) -> None:
    """Whether the data set's files are there and the options fit it; opens no file.

    Raises:
        InputError: one line for each option that does not apply, and for absent folders, files and classes.
    """
    problems = _option_problems(options)
    if not problems and options.root is not None:
        if options.name == "imagefolder":
            problems = _folder_problems(Path(options.root).expanduser())
        elif not options.download:
            problems = _file_problems(options.name, Path(options.root).expanduser())
    if problems:
        raise InputError(*problems)


def data_shape(options: DataOptions) -> tuple[int, int, int]:
    """(classes, channels, side in pixels) of a data set that :func:`check_data` found fit, without reading images."""
    if options.name == "imagefolder":
        assert options.root is not None  # check_data refuses its absence
        classes = _class_names(Path(options.root).expanduser() / "train")
        return len(classes), 3, options.image_size or 224
    if options.name == "mnist":
        return 10, 1, 28
    return 100 if options.name == "cifar100" else 10, 3, options.image_size or 32


def train_size(options: DataOptions) -> int | None:
    """Number of training images, or None where only reading the folder tells."""
    return options.train_size or {"shapes": _DRAWN, **_SIZES}.get(options.name, (None,))[0]


def load_data(options: DataOptions, seed: int) -> Data:
    """Load, download or draw the data set that ``options`` names, and its subsets.

    ``options.augment`` is for the caller to hand to ``train.batches``.

    Args:
        options: the recipe's ``data`` section.
        seed: of the subsets and of drawn data, >= 0.

    Raises:
        InputError: what :func:`check_data` finds, damaged files, a failed download, a subset larger than the data.
    """
    check_data(options)
    if options.name == "shapes":
        return _load_shapes(options, seed)
    assert options.root is not None  # check_data refuses its absence
    root = Path(options.root).expanduser()
    data = _load_folder(options, root) if options.name == "imagefolder" else _load_published(options, root)
    problems = []
    splits: dict[str, Any] = {}
    for split, size in (("train", options.train_size), ("test", options.test_size)):
        source: Any = getattr(data, split)
        if size is not None and size > len(source):
            problems.append(f"data.{split}_size: expected at most {len(source)}, found {size}")
        elif size is not None:
            splits[split] = source.subset(size, derive_seed(seed, "subset", split))
    if problems:
        raise InputError(*problems)
    return replace(data, **splits)


def _option_problems(options: DataOptions) -> list[str]:
    name = options.name
    problems = []
    if name == "shapes" and options.root is not None:
        problems.append(f"data.root: expected nothing for shapes, which needs no files, found {options.root}")
    if name != "shapes" and options.root is None:
        problems.append(f"data.root: expected the folder of {name}, found nothing")
    if name != "imagefolder" and options.workers is not None:
        problems.append(f"data.workers: expected nothing for {name}, which is held in memory, found {options.workers}")
    if name in ("shapes", "imagefolder") and options.download:
        problems.append(f"data.download: expected false for {name}, which is not downloaded, found true")
    if name in _SIZES and options.image_size is not None:
        side = 28 if name == "mnist" else 32
        problems.append(
            f"data.image_size: expected nothing for {name}, whose images have {side} pixels a side, "
            f"found {options.image_size}"
        )
    for split, size, most in zip(
        ("train", "test"), (options.train_size, options.test_size), _SIZES.get(name, ()), strict=False
    ):
        if size is not None and size > most:
            problems.append(f"data.{split}_size: expected at most {most}, found {size}")
    return problems


def _file_problems(name: str, root: Path) -> list[str]:
    folder, files = _FILES[name]
    fetch = "data.download: true would fetch it"
    if not root.is_dir():
        return [f"data.root: expected the folder that holds {folder} ({name}), found no folder {root}; {fetch}"]
    if not (root / folder).is_dir():
        return [f"data.root: expected the folder {folder} ({name}) in {root}, found none; {fetch}"]
    if absent := [file for file in files if not (root / folder / file).is_file()]:
        return [f"data.root: expected {', '.join(absent)} ({name}) in {root / folder}, found none; {fetch}"]
    return []


def _load_published(options: DataOptions, root: Path) -> Data:
    from torchvision import datasets  # type: ignore[import-untyped, unused-ignore]

    name = options.name
    kind: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "mnist": datasets.MNIST}[name]
    if options.download:
        try:
            kind(root, train=True, download=True)
        except Exception as error:  # network, disk and checksum failures have no common type
            raise InputError(
                f"data.download: expected to fetch {name} to {root}, failed: {first_line(error)}"
            ) from error
    damaged = _damaged(kind, root)
    try:
        if damaged:
            raise RuntimeError(f"wrong checksum of {', '.join(damaged)}")
        with warnings.catch_warnings():
            # numpy's notice about the alignment flag in the pickles as published; there is nothing to do about it.
            warnings.filterwarnings("ignore", message=r".*align should be passed as Python or NumPy boolean")
            splits = [kind(root, train=train) for train in (True, False)]
        images = [_to_tensor(split.data) for split in splits]
        labels = [torch.as_tensor(split.targets, dtype=torch.int64) for split in splits]
        for split_images, split_labels, expected in zip(images, labels, _SIZES[name], strict=True):
            if not len(split_images) == len(split_labels) == expected:
                raise RuntimeError(f"{len(split_images)} images and {len(split_labels)} labels instead of {expected}")
    except Exception as error:  # damaged files raise a dozen types: RuntimeError, ValueError, AssertionError, ...
        raise InputError(
            f"data.root: expected the files of {name} as published in {root / _FILES[name][0]}, found damaged ones "
            f"({first_line(error)}); remove them, and data.download: true would fetch them"
        ) from error
    mean, std = channel_statistics(images[0])
    train, test = (Images(i, y, mean, std) for i, y in zip(images, labels, strict=True))
    classes = [str(c) for c in splits[0].classes]
    return Data(train, test, len(classes), images[0].shape[1], images[0].shape[2], classes)


def _damaged(kind: Any, root: Path) -> list[str]:
    """Names of the files whose checksum is not the published one; torchvision has none for MNIST's unpacked files."""
    from torchvision.datasets.utils import check_md5  # type: ignore[import-untyped, unused-ignore]

    if not hasattr(kind, "train_list"):
        return []
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    return [name for name, md5 in files if not check_md5(root / kind.base_folder / name, md5)]


def _to_tensor(images: Any) -> Tensor:
    """[N, H, W] or [N, H, W, C], array or tensor, to contiguous [N, C, H, W]."""
    tensor = torch.as_tensor(images)
    return tensor[:, None] if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2).contiguous()


# --- a folder of images -------------------------------------------------------------------------------------------


class FolderImages:
    """Images that worker processes decode from disk; see :class:`ImageSource` for what its methods do.

    Cropping is torchvision's RandomResizedCrop; without it the images are resized and cropped in the middle. Mirroring
    and cutout are done in batches, as for images in memory. Each image's crop has a seed of its own, so the batches do
    not depend on the number of workers.

    Args:
        samples: path and label of each image.
        image_size: side of the square that is delivered.
        workers: processes that decode; 0: the calling one.
        device: of the batches.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        image_size: int,
        workers: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.samples = list(samples)
        self.labels = torch.tensor([label for _, label in self.samples])
        self.mean, self.std = torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
        self.image_size, self.workers, self.device = image_size, workers, torch.device(device)

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device | str) -> FolderImages:
        return FolderImages(self.samples, self.image_size, self.workers, device)

    def subset(self, size: int, seed: int) -> FolderImages:
        """``size`` images drawn without replacement, in their original order; size in [1, len(self)]."""
        rows = _drawn_rows(len(self), size, seed).tolist()
        return FolderImages([self.samples[row] for row in rows], self.image_size, self.workers, self.device)

    def batches(
        self, batch_size: int, *, seed: int | None = None, augment: Sequence[str] = (), drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        _check_batches(batch_size, seed, augment)
        return self._batches(batch_size, seed, augment, drop_last)

    def _batches(
        self, batch_size: int, seed: int | None, augment: Sequence[str], drop_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=generator.manual_seed(seed))
        crop_seeds = torch.randint(2**62, (len(self),), generator=generator)
        keys = list(zip(order.tolist(), crop_seeds.tolist(), strict=True))
        loader: DataLoader[Any] = DataLoader(
            _Decoder(self.samples, self.image_size, "crop" in augment),
            batch_size=batch_size,
            sampler=keys,
            drop_last=drop_last,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            # Otherwise the loader would draw a number from the global generator.
            generator=torch.Generator(),
        )
        mean, std = self.mean.to(self.device), self.std.to(self.device)
        others = [name for name in augment if name != "crop"]
        for images, labels, unreadable in loader:
            if unreadable:
                raise InputError(*unreadable)
            images = _normalise(images.to(self.device, non_blocking=True), mean, std)
            yield _augment(images, others, generator), labels.to(self.device, non_blocking=True)


class _Decoder(Dataset[Any]):
    """Dataset whose key is (row, seed of the crop); gives a uint8 image [3, S, S] and its label, or what is wrong."""

    def __init__(self, samples: Sequence[tuple[str, int]], image_size: int, random_crop: bool) -> None:
        from torchvision.transforms import v2  # type: ignore[import-untyped, unused-ignore]

        self.samples = samples
        cut = (
            [v2.RandomResizedCrop(image_size)]
            if random_crop
            else [v2.Resize(math.ceil(image_size * 256 / 224)), v2.CenterCrop(image_size)]
        )
        self.transform = v2.Compose([*cut, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        from PIL import Image

        row, seed = key
        path, label = self.samples[row]
        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
        except Exception as error:
            return f"data.root: expected an image, cannot read {path}: {first_line(error)}"
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs of the calling process too.
            torch.default_generator.manual_seed(seed)
            return self.transform(rgb), label


def _collate(samples: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    """Stack a batch; problems travel as text, because an exception from a worker would arrive with its traceback."""
    unreadable = [sample for sample in samples if isinstance(sample, str)]
    if unreadable:
        return torch.empty(0), torch.empty(0), unreadable
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), []


def _test_folder(root: Path) -> Path:
    # ImageNet's test split has no labels, so its validation split is what is tested on where both exist.
    return root / "val" if (root / "val").is_dir() else root / "test"


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _folder_problems(root: Path) -> list[str]:
    if not root.is_dir():
        return [f"data.root: expected a folder with train and val (or test) in it, found no folder {root}"]
    splits = [root / "train", _test_folder(root)]
    absent = [name for split, name in zip(splits, ("train", "val or test"), strict=True) if not split.is_dir()]
    if absent:
        return [f"data.root: expected a folder {name} in {root}, found none" for name in absent]
    train, test = (_class_names(split) for split in splits)
    if len(train) < 2:
        return [f"data.root: expected a folder for each of at least 2 classes in {splits[0]}, found {len(train)}"]
    if train != test:
        only = [
            f"only in {split.name}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for split, names in (
                (splits[0], sorted(set(train) - set(test))),
                (splits[1], sorted(set(test) - set(train))),
            )
            if names
        ]
        return [f"data.root: expected the same classes in {splits[0]} and {splits[1]}, found {'; '.join(only)}"]
    return []


def _load_folder(options: DataOptions, root: Path) -> Data:
    from torchvision import datasets

    side = options.image_size or 224
    found = []
    for folder in (root / "train", _test_folder(root)):
        try:
            found.append(datasets.ImageFolder(str(folder)))
        except FileNotFoundError as error:
            raise InputError(f"data.root: expected images of every class in {folder}: {first_line(error)}") from error
    workers = 2 if options.workers is None else options.workers
    train, test = (FolderImages(split.samples, side, workers) for split in found)
    return Data(train, test, len(found[0].classes), 3, side, list(found[0].classes))


# --- drawn data ---------------------------------------------------------------------------------------------------


def draw_shapes(count: int, image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images of ten classes (``SHAPES``): place, size, slight rotation, colours and noise are random.

    Args:
        count: images, >= 1; the classes are as balanced as it allows.
        image_size: side in pixels, >= 8.
        seed: >= 0.

    Returns:
        Images, uint8 [count, 3, image_size, image_size], and labels, int64 [count].
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(count, generator=generator) % len(SHAPES)
    # In parts of 2**19 pixels: memory stays bounded, and the cache holds what is worked on.
    parts = torch.split(labels, max(1, 2**19 // image_size**2))
    return torch.cat([_draw_part(part, image_size, generator) for part in parts]), labels


def _draw_part(labels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Labels int64 [B] -> uint8 images [B, 3, side, side]."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1)), generator=generator)

    # Pixels in the shape's own frame (u to the right, v down), where it fills the square from -1 to 1.
    radius = uniform(0.42, 0.8)
    angle = uniform(-math.pi / 15, math.pi / 15)
    pixels = (torch.arange(side) + 0.5) * (2 / side) - 1
    x = pixels[None, None, :] - uniform(-1, 1) * (1 - radius)
    y = pixels[None, :, None] - uniform(-1, 1) * (1 - radius)
    u = (torch.cos(angle) * x + torch.sin(angle) * y) / radius
    v = (torch.cos(angle) * y - torch.sin(angle) * x) / radius

    inside = torch.empty(count, side, side)
    for label in range(len(SHAPES)):
        rows = labels == label
        if rows.any():
            inside[rows] = _inside(SHAPES[label], u[rows], v[rows])
    # One pixel of soft edge; distances are in units of the radius.
    coverage = (0.5 + inside * radius * (side / 2)).clamp_(0, 1)[:, None]

    back = torch.rand(count, 3, 1, 1, generator=generator)
    # Every channel of the foreground differs from the background by 0.3 to 0.5, towards the farther end.
    fore = back + torch.where(back < 0.5, 1.0, -1.0) * uniform(0.3, 0.5, 3, 1, 1)
    images = torch.lerp(back, fore, coverage)
    images += 0.08 * torch.randn(images.shape, generator=generator)
    return images.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def _inside(name: str, u: Tensor, v: Tensor) -> Tensor:
    """About the distance to the shape's edge, positive inside, in units of the shape's radius; u, v: [B, H, W]."""
    square = torch.maximum(u.abs(), v.abs())
    waves = 2.5 * math.pi  # two and a half stripes of each colour, which at 32 pixels are 3 or more wide

    def bars(t: Tensor) -> Tensor:
        return torch.sin(waves * t) / waves

    if name == "disc":
        return 0.95 - torch.hypot(u, v)
    if name == "ring":
        return 0.22 - (torch.hypot(u, v) - 0.73).abs()
    if name == "square":
        return 0.85 - square
    if name == "frame":
        return 0.2 - (square - 0.68).abs()
    if name == "triangle":
        # Equilateral, apex up: the three edges lie 0.5 from the centre.
        return 0.5 - torch.maximum(v, (math.sqrt(3) / 2) * u.abs() - 0.5 * v)
    if name in ("cross", "plus"):
        if name == "cross":
            u, v = (u + v) * math.sqrt(0.5), (u - v) * math.sqrt(0.5)
        a, b = u.abs(), v.abs()
        return torch.maximum(torch.minimum(0.95 - a, 0.25 - b), torch.minimum(0.95 - b, 0.25 - a))
    pattern = {"horizontal stripes": bars(v), "vertical stripes": bars(u), "checkerboard": bars(u) * bars(v) * waves}
    return torch.minimum(0.9 - square, pattern[name])


def _load_shapes(options: DataOptions, seed: int) -> Data:
    side = options.image_size or 32
    drawn = [
        draw_shapes(size, side, derive_seed(seed, "shapes", split))
        for split, size in (("train", options.train_size or _DRAWN[0]), ("test", options.test_size or _DRAWN[1]))
    ]
    mean, std = channel_statistics(drawn[0][0])
    train, test = (Images(images, labels, mean, std) for images, labels in drawn)
    return Data(train, test, len(SHAPES), 3, side, list(SHAPES))

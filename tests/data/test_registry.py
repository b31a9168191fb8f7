"""Batches reproduce from their seed alone, augmentation equals a plain loop, and every bad folder is named."""

from __future__ import annotations

import gzip
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dnr_plugin.data import torchvision_sets as module
from dnr_plugin.data.augment import crop, cutout, flip
from dnr_plugin.data.folder import FolderImages
from dnr_plugin.data.images import Images, channel_statistics
from dnr_plugin.data.registry import check_data, load_data
from dnr_plugin.data.shapes import SHAPES, draw_shapes
from dnr_plugin.errors import InputError
from dnr_plugin.recipe.sections import DataOptions
from dnr_plugin.seeds import derive_seed

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_cifar = pytest.mark.skipif(
    not (SHARED / "cifar-10-batches-py").is_dir(), reason=f"CIFAR-10 is absent: no {SHARED / 'cifar-10-batches-py'}"
)


def problem(function: Any, *args: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*args)
    (line,) = caught.value.problems
    assert "\n" not in line
    return str(line)


def some_images(count: int = 23, channels: int = 3, size: int = 16) -> Images:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return Images(images, torch.arange(count), *channel_statistics(images))


def gather(batches: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


# --- batches ------------------------------------------------------------------------------------------------------


def test_without_a_seed_batches_come_in_order_and_normalised() -> None:
    data = some_images()
    batches = list(data.batches(5))
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    images, labels = gather(batches)
    assert labels.tolist() == list(range(23)) and labels.dtype == torch.int64 and images.dtype == torch.float32
    pixels = data.images.double() / 255
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), correction=0, keepdim=True)
    assert torch.allclose(images.double(), (pixels - mean) / std, atol=1e-5)
    assert [len(labels) for _, labels in data.batches(5, drop_last=True)] == [5, 5, 5, 5]
    assert [len(labels) for _, labels in data.batches(100)] == [23]
    assert list(data.batches(100, drop_last=True)) == []


def test_batches_depend_on_their_seed_alone() -> None:
    data = some_images()
    augment = ("flip", "crop", "cutout")
    torch.manual_seed(1)
    images, labels = gather(data.batches(5, seed=7, augment=augment))
    torch.manual_seed(2)
    torch.rand(10)
    list(data.batches(4, seed=3, augment=augment))
    state = torch.get_rng_state()
    again, again_labels = gather(data.batches(5, seed=7, augment=augment))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, again) and torch.equal(labels, again_labels)
    _, other_labels = gather(data.batches(5, seed=8, augment=augment))
    assert not torch.equal(labels, other_labels)
    assert sorted(labels.tolist()) == sorted(other_labels.tolist()) == list(range(23))
    swapped, _ = gather(data.batches(5, seed=7, augment=("cutout", "crop", "flip")))
    assert torch.equal(images, swapped)


def test_two_iterations_at_once_do_not_disturb_each_other() -> None:
    data = some_images()
    expected = gather(data.batches(5, seed=7, augment=["crop"]))[0]
    pairs = zip(data.batches(5, seed=7, augment=["crop"]), data.batches(5, seed=9, augment=["crop"]), strict=True)
    assert torch.equal(torch.cat([first[0] for first, _ in pairs]), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
        ({"batch_size": 2, "seed": 1, "augment": ["blur"]}, "augment: expected any of flip, crop, cutout, found blur"),
        ({"batch_size": 2, "augment": ["flip"]}, "augment: expected a seed to draw from, found None"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(arguments: dict[str, Any], message: str) -> None:
    for source in (some_images(), FolderImages([("a.png", 0)], 8, 0)):
        with pytest.raises(ValueError, match=message):
            source.batches(**arguments)


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(s, split, e) for s in range(20) for split in ("train", "test") for e in range(20)}
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


# --- augmentation -------------------------------------------------------------------------------------------------


def test_flip_equals_a_loop() -> None:
    images, mirrored = torch.randn(6, 3, 5, 5), torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    expected = torch.stack([i.flip(-1) if m else i for i, m in zip(images, mirrored, strict=True)])
    assert torch.equal(flip(images, mirrored), expected)


def test_crop_equals_a_loop() -> None:
    size, padding = 9, 2
    places = torch.cartesian_prod(torch.arange(2 * padding + 1), torch.arange(2 * padding + 1))
    images = torch.randn(len(places), 3, size, size)
    expected = torch.zeros_like(images)
    for n, (top, left) in enumerate(places.tolist()):
        for row in range(size):
            for column in range(size):
                i, j = row + top - padding, column + left - padding
                if 0 <= i < size and 0 <= j < size:
                    expected[n, :, row, column] = images[n, :, i, j]
    assert torch.equal(crop(images, places[:, 0], places[:, 1], padding), expected)


@pytest.mark.parametrize("side", [3, 4])
def test_cutout_equals_a_loop(side: int) -> None:
    size = 8
    places = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    images = torch.randn(len(places), 3, size, size)
    expected = images.clone()
    for image, (row, column) in zip(expected, places.tolist(), strict=True):
        top, left = row - side // 2, column - side // 2
        image[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
    assert torch.equal(cutout(images, places[:, 0], places[:, 1], side), expected)


def test_flip_mirrors_about_half() -> None:
    data = some_images(400, size=8)
    images, labels = gather(data.batches(64, seed=1, augment=["flip"]))
    plain = gather(data.batches(400))[0][labels]
    kept = (images == plain).all((1, 2, 3))
    assert torch.equal(images[~kept], plain[~kept].flip(3))
    assert 150 < int(kept.sum()) < 250


def test_crop_pads_an_eighth_with_normalised_zeros_and_reaches_every_place() -> None:
    data = some_images(600, channels=1, size=16)
    images, labels = gather(data.batches(600, seed=1, augment=["crop"]))
    padded = torch.nn.functional.pad(gather(data.batches(600))[0][labels], (2, 2, 2, 2))
    places = set()
    for image, source in zip(images, padded, strict=True):
        fits = [(i, j) for i in range(5) for j in range(5) if torch.equal(image, source[:, i : i + 16, j : j + 16])]
        assert len(fits) == 1
        places.update(fits)
    assert len(places) == 25


def test_cutout_blanks_half_the_side_clipped() -> None:
    data = some_images(300, size=16)
    images, labels = gather(data.batches(300, seed=1, augment=["cutout"]))
    plain = gather(data.batches(300))[0][labels]
    blank = (images != plain).any(1) | (images == 0).all(1)
    assert torch.equal(images, plain * ~blank[:, None])
    heights, widths = blank.any(2).sum(1), blank.any(1).sum(1)
    assert torch.equal(blank.sum((1, 2)), heights * widths)  # a rectangle
    assert set(heights.tolist()) == set(widths.tolist()) == {4, 5, 6, 7, 8}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the devices' batches cannot be compared")
def test_devices_see_the_same_batches() -> None:
    augment = ("flip", "crop", "cutout")
    here = gather(some_images().batches(5, seed=7, augment=augment))
    there = gather(some_images().to("cuda").batches(5, seed=7, augment=augment))
    assert there[0].is_cuda and torch.equal(there[1].cpu(), here[1])
    assert torch.allclose(there[0].cpu(), here[0], atol=1e-5)


def test_to_moves_everything() -> None:
    moved = some_images().to("meta")
    assert {t.device.type for t in (moved.images, moved.labels, moved.mean, moved.std)} == {"meta"}


def test_subset_is_drawn_without_replacement_by_the_seed() -> None:
    data = some_images()
    first = data.subset(10, 1)
    assert len(first) == len(set(first.labels.tolist())) == 10
    assert torch.equal(first.images, data.images[first.labels]) and torch.equal(first.mean, data.mean)
    assert torch.equal(first.labels, data.subset(10, 1).labels)
    assert not torch.equal(first.labels, data.subset(10, 2).labels)


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    images = torch.full((4, 1, 8, 8), 7, dtype=torch.uint8)
    data = Images(images, torch.zeros(4, dtype=torch.int64), *channel_statistics(images))
    assert torch.allclose(gather(data.batches(4))[0], torch.zeros(4, 1, 8, 8), atol=1e-4)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "shapes", "root": "a"}, "data.root: expected nothing for shapes, which needs no files, found a"),
        (
            {"name": "shapes", "download": True},
            "data.download: expected false for shapes, which is not downloaded, found true",
        ),
        ({"name": "mnist"}, "data.root: expected the folder of mnist, found nothing"),
        (
            {"name": "cifar10", "root": "a", "download": True, "image_size": 64},
            "data.image_size: expected nothing for cifar10, whose images have 32 pixels a side, found 64",
        ),
        (
            {"name": "mnist", "root": "a", "download": True, "image_size": 32},
            "data.image_size: expected nothing for mnist, whose images have 28 pixels a side, found 32",
        ),
        (
            {"name": "cifar10", "root": "a", "download": True, "train_size": 60_000},
            "data.train_size: expected at most 50000, found 60000",
        ),
        (
            {"name": "mnist", "root": "a", "download": True, "test_size": 10_001},
            "data.test_size: expected at most 10000, found 10001",
        ),
        (
            {"name": "shapes", "workers": 2},
            "data.workers: expected nothing for shapes, which is held in memory, found 2",
        ),
        (
            {"name": "imagefolder", "root": "no/such"},
            "data.root: expected a folder with train and val (or test) in it, found no folder no/such",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    assert problem(check_data, DataOptions(**options)) == message
    assert problem(load_data, DataOptions(**options), 0) == message


def test_imagefolder_is_not_downloaded(tmp_path: Path) -> None:
    options = DataOptions(name="imagefolder", root=str(tmp_path), download=True)
    assert problem(check_data, options) == (
        "data.download: expected false for imagefolder, which is not downloaded, found true"
    )


# --- published sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python"), ("mnist", "MNIST/raw")]
)
def test_absent_files_are_named(tmp_path: Path, name: str, folder: str) -> None:
    def message(root: Path) -> str:
        options = DataOptions(name=name, root=str(root))
        line = problem(check_data, options)
        assert line == problem(load_data, options, 0)
        return line

    fetch = "; data.download: true would fetch it"
    absent = tmp_path / "absent"
    assert message(absent) == (
        f"data.root: expected the folder that holds {folder} ({name}), found no folder {absent}{fetch}"
    )
    assert message(tmp_path) == f"data.root: expected the folder {folder} ({name}) in {tmp_path}, found none{fetch}"
    (tmp_path / folder).mkdir(parents=True)
    files = module._FILES[name][1]
    for file in files[1:]:
        (tmp_path / folder / file).write_bytes(b"?")
    assert message(tmp_path) == f"data.root: expected {files[0]} ({name}) in {tmp_path / folder}, found none{fetch}"
    (tmp_path / folder / files[0]).write_bytes(b"?")
    options = DataOptions(name=name, root=str(tmp_path))
    check_data(options)  # the files are there; what is in them is for the loader
    line = problem(load_data, options, 0)
    assert line.startswith(
        f"data.root: expected the files of {name} as published in {tmp_path / folder}, found damaged"
    )
    assert line.endswith("data.download: true would fetch them")
    assert name == "mnist" or f"(wrong checksum of {', '.join(files)})" in line


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    def offline(self: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(datasets.CIFAR100, "download", offline)
    options = DataOptions(name="cifar100", root=str(tmp_path), download=True)
    check_data(options)
    assert (
        problem(load_data, options, 0) == f"data.download: expected to fetch cifar100 to {tmp_path}, failed: no network"
    )


def write_mnist(folder: Path, train: int, test: int) -> None:
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("t10k", test)):
        pixels = (np.arange(count * 784) % 251).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def test_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "MNIST" / "raw", 40, 20)
    options = DataOptions(name="mnist", root=str(tmp_path), train_size=30)
    assert "(40 images and 40 labels instead of 60000)" in problem(load_data, options, 0)
    monkeypatch.setitem(module.SIZES, "mnist", (40, 20))
    data = load_data(options, 0)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 28)
    assert len(data.train) == 30 and len(data.test) == 20 and len(data.classes) == 10
    images, labels = next(data.test.batches(20))
    assert images.shape == (20, 1, 28, 28) and labels.tolist() == [n % 10 for n in range(20)]
    raw = torch.arange(20 * 784).reshape(20, 1, 28, 28) % 251
    assert torch.allclose(images * data.test.std + data.test.mean, raw / 255, atol=1e-5)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "found damaged ones" in problem(load_data, options, 0)


def test_cifar_layout_with_made_up_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-100's reading, subset and labels, where the published files are absent."""
    datasets = pytest.importorskip("torchvision.datasets")
    utils = pytest.importorskip("torchvision.datasets.utils")
    kind, folder = datasets.CIFAR100, tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = (np.arange(50 * 3072) % 253).astype(np.uint8).reshape(50, 3072)
    for name, content in (
        ("train", {"data": pixels, "fine_labels": list(range(50))}),
        ("test", {"data": pixels[:10], "fine_labels": list(range(10))}),
        ("meta", {"fine_label_names": [f"class {n}" for n in range(100)]}),
    ):
        (folder / name).write_bytes(pickle.dumps(content))
    sums = {name: utils.calculate_md5(folder / name) for name in ("train", "test", "meta")}
    monkeypatch.setattr(kind, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["meta"]})
    monkeypatch.setitem(module.SIZES, "cifar100", (50, 10))
    data = load_data(DataOptions(name="cifar100", root=str(tmp_path), train_size=20, test_size=10), 3)
    assert data.num_classes == 100 and data.classes[99] == "class 99" and data.image_size == 32
    rows = data.train.labels
    assert torch.equal(data.train.images, torch.from_numpy(pixels.reshape(50, 3, 32, 32))[rows])
    assert not torch.equal(
        load_data(DataOptions(name="cifar100", root=str(tmp_path), train_size=20), 4).train.labels, rows
    )
    (folder / "test").write_bytes(b"damaged")
    assert "(wrong checksum of test)" in problem(load_data, DataOptions(name="cifar100", root=str(tmp_path)), 0)


@needs_cifar
def test_cifar10_as_published() -> None:
    options = DataOptions(name="cifar10", root=str(SHARED), test_size=500)
    check_data(options)
    data = load_data(options, 0)
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 3, 32)
    assert data.classes[0] == "airplane" and data.classes[9] == "truck"
    assert len(data.train) == 50_000 and len(data.test) == 500
    assert data.train.labels.bincount().tolist() == [5000] * 10
    assert data.train.mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert data.train.std.tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-4)
    assert torch.equal(data.test.mean, data.train.mean)
    images, labels = next(data.train.batches(1))
    assert labels.tolist() == [6]  # a frog
    # Its first pixel as published is (59, 62, 63).
    assert (images[0, :, 0, 0] * data.train.std + data.train.mean).mul(255).round().tolist() == [59, 62, 63]


@needs_cifar
def test_damaged_cifar10_names_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (SHARED / "cifar-10-batches-py").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "data_batch_3").unlink()
    content = bytearray((SHARED / "cifar-10-batches-py" / "data_batch_3").read_bytes())
    content[1000] ^= 1
    (folder / "data_batch_3").write_bytes(content)
    line = problem(load_data, DataOptions(name="cifar10", root=str(tmp_path)), 0)
    assert "found damaged ones (wrong checksum of data_batch_3)" in line


# --- image folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; 8 training and 4 validation images of 20 x 30 pixels, whose red value is their number."""
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = np.random.default_rng(n).integers(0, 256, (20, 30, 3), dtype=np.uint8)
                pixels[..., 0] = 10 * (label * count + n)
                image.fromarray(pixels).save(tmp_path / split / name / f"{n}.png")
    return tmp_path


def load_folder(root: Path, workers: int = 0, **options: Any) -> Any:
    return load_data(DataOptions(name="imagefolder", root=str(root), image_size=16, workers=workers, **options), 0)


def red(images: Tensor) -> list[int]:
    return [round(v) for v in ((images[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255 / 10).tolist()]


def test_imagefolder(folder: Path) -> None:
    data = load_folder(folder)
    assert (data.num_classes, data.in_channels, data.image_size, data.classes) == (2, 3, 16, ["cat", "dog"])
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 and len(data.test) == 4
    batches = list(data.train.batches(3))
    images, labels = gather(batches)
    assert [len(y) for _, y in batches] == [3, 3, 2] and [len(y) for _, y in data.train.batches(3, drop_last=True)] == [
        3,
        3,
    ]
    assert images.shape == (8, 3, 16, 16) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert red(images) == list(range(8)) and torch.equal(labels, data.train.labels)
    assert load_data(DataOptions(name="imagefolder", root=str(folder)), 0).image_size == 224


@pytest.mark.parametrize("augment", [(), ("flip", "crop", "cutout")])
def test_imagefolder_depends_on_the_seed_alone(folder: Path, augment: tuple[str, ...]) -> None:
    state = torch.get_rng_state()
    images, labels = gather(load_folder(folder).train.batches(3, seed=1, augment=augment))
    for workers in (0, 1, 2):
        again = gather(load_folder(folder, workers).train.batches(3, seed=1, augment=augment))
        assert torch.equal(again[0], images) and torch.equal(again[1], labels)
    assert torch.equal(torch.get_rng_state(), state)
    other = gather(load_folder(folder).train.batches(3, seed=2, augment=augment))
    assert not torch.equal(other[0], images)
    if not augment:
        assert sorted(red(images)) == list(range(8)) != red(images)


def test_imagefolder_crops_at_random_only_when_told(folder: Path) -> None:
    train = load_folder(folder).train
    plain, labels = gather(train.batches(8, seed=1))
    cropped, cropped_labels = gather(train.batches(8, seed=1, augment=["crop"]))
    assert torch.equal(labels, cropped_labels) and red(plain) == red(cropped)
    assert all(not torch.equal(a, b) for a, b in zip(plain, cropped, strict=True))
    mirrored, _ = gather(train.batches(8, seed=1, augment=["flip"]))
    kept = [torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    assert all(k or torch.equal(a.flip(2), b) for k, a, b in zip(kept, plain, mirrored, strict=True))
    assert 0 < sum(kept) < 8
    blanked, _ = gather(train.batches(8, seed=1, augment=["cutout"]))
    assert all(16 <= int((image == 0).all(0).sum()) <= 64 for image in blanked)


def test_imagefolder_subset(folder: Path) -> None:
    data = load_folder(folder, train_size=5)
    assert len(data.train) == 5 and len(set(red(gather(data.train.batches(5))[0]))) == 5
    options = DataOptions(name="imagefolder", root=str(folder), train_size=9)
    assert problem(load_data, options, 0) == "data.train_size: expected at most 8, found 9"


def test_imagefolder_takes_test_where_val_is_absent(folder: Path) -> None:
    (folder / "val").rename(folder / "test")
    assert len(load_folder(folder).test) == 4
    (folder / "test").rename(folder / "elsewhere")
    options = DataOptions(name="imagefolder", root=str(folder))
    assert problem(check_data, options) == f"data.root: expected a folder val or test in {folder}, found none"


def test_imagefolder_classes_must_agree(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    options = DataOptions(name="imagefolder", root=str(folder))
    assert problem(check_data, options) == (
        f"data.root: expected the same classes in {folder / 'train'} and {folder / 'val'}, "
        "found only in train: dog; only in val: wolf"
    )


def test_imagefolder_without_classes_or_images(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for file in (folder / "val" / "dog").iterdir():
        file.unlink()
    options = DataOptions(name="imagefolder", root=str(folder))
    assert problem(load_data, options, 0).startswith(
        f"data.root: expected images of every class in {folder / 'val'}: Found no valid file for the classes dog"
    )
    empty = tmp_path_factory.mktemp("empty")
    (empty / "train").mkdir()
    (empty / "val").mkdir()
    assert problem(check_data, DataOptions(name="imagefolder", root=str(empty))) == (
        f"data.root: expected a folder for each of at least 2 classes in {empty / 'train'}, found 0"
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", ["text", "half"])
def test_imagefolder_names_an_unreadable_image(folder: Path, workers: int, content: str) -> None:
    path = folder / "train" / "cat" / "2.png"
    path.write_bytes(b"no image" if content == "text" else path.read_bytes()[:200])
    line = problem(lambda: list(load_folder(folder, workers).train.batches(3)))
    assert line.startswith(f"data.root: expected an image, cannot read {path}: ")


# --- shapes -------------------------------------------------------------------------------------------------------


def test_shapes() -> None:
    start = time.perf_counter()
    data = load_data(DataOptions(name="shapes"), 0)
    assert time.perf_counter() - start < 6  # 0.6 s on one free core
    assert (data.num_classes, data.in_channels, data.image_size, data.classes) == (10, 3, 32, list(SHAPES))
    assert len(data.train) == 5000 and len(data.test) == 1000
    assert data.train.labels.bincount().tolist() == [500] * 10 and data.test.labels.bincount().tolist() == [100] * 10
    assert data.train.images.dtype == torch.uint8 and data.train.images.shape == (5000, 3, 32, 32)
    images = gather(data.train.batches(5000))[0]
    assert images.mean((0, 2, 3)).abs().max() < 1e-3 and (images.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_shapes_are_drawn_by_the_seed_and_test_is_not_train() -> None:
    options = DataOptions(name="shapes", train_size=50, test_size=50)
    state = torch.get_rng_state()
    data, again, other = load_data(options, 1), load_data(options, 1), load_data(options, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.train.images, again.train.images) and torch.equal(data.test.labels, again.test.labels)
    assert not torch.equal(data.train.images, other.train.images)
    assert not torch.equal(data.train.images, data.test.images)


def test_shapes_honours_sizes() -> None:
    data = load_data(DataOptions(name="shapes", train_size=7, test_size=3, image_size=80), 0)
    assert data.train.images.shape == (7, 3, 80, 80) and len(data.test) == 3 and data.image_size == 80
    images, labels = draw_shapes(200, 128, 3)  # more than one part
    assert len(images) == len(labels) == 200 and labels.bincount().tolist() == [20] * 10


def test_a_linear_classifier_does_not_solve_shapes() -> None:
    data = load_data(DataOptions(name="shapes"), 0)
    (x, y), (x_test, y_test) = (next(s.batches(5000)) for s in (data.train, data.test))
    x, x_test = x.flatten(1), x_test.flatten(1)
    # Ridge regression, in its dual-free form: the best linear classifier in the squared sense.
    weight = torch.linalg.solve(x.T @ x + 1000 * torch.eye(x.shape[1]), x.T @ torch.nn.functional.one_hot(y).float())
    accuracy = ((x_test @ weight).argmax(1) == y_test).float().mean().item()
    assert accuracy < 0.5

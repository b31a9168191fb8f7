"""A saved model as one file for other programs: ONNX, or what ``torch.export.load`` reads."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError, RunError, did_you_mean, first_line
from dnr_plugin.models.saved import saved_model
from dnr_plugin.network.calling import output_difference
from dnr_plugin.network.onnx_runtime import INSTALL, missing_package, session, silent

LIMIT = 1e-4  # largest relative difference of the outputs that is written
BATCHES = (1, 3)  # sizes that are compared; neither is the one that is traced
_TRACED = 2  # torch.export takes a batch of one for a constant
Runner = Callable[[Tensor], Tensor]


def export_model(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    format: str,
    shape: str | None = None,
    allow_import: bool = False,
) -> float:
    """Exports a saved model with a free batch size, reads the file back and compares its outputs with the model's.

    Args:
        folder: of a finished run, or written by `saved.save_pruned`.
        file: to be written; there is none yet.
        format: a key of `FORMATS`: "onnx", or "torch" for the archive of `torch.export.save`.
        shape: of one image, as "3x32x32"; None for what the model's builder says.
        allow_import: see `saved.load_pruned`.

    Returns:
        The largest difference of the outputs, relative to the largest output, over random images of a fixed seed in
        batches of `BATCHES`.

    Raises:
        InputError: folder, file, shape or the packages at hand cannot be used; nothing was written.
        RunError: the model cannot be exported, or the outputs differ by more than `LIMIT`; no file remains.
    """
    file = Path(file)
    if format not in FORMATS:
        hint = did_you_mean(format, FORMATS)
        raise InputError(f"--format: expected one of {', '.join(FORMATS)}, found {format!r}{hint}")
    if format == "onnx":
        check_packages()
    check_file(file)
    model, _, example = saved_model(Path(folder), shape, allow_import)
    with appearing(file) as written:
        return write_checked(model, example, written, format, str(folder))


@contextlib.contextmanager
def appearing(file: Path) -> Iterator[Path]:
    """A path to write to; what lies there becomes ``file`` when the block ends, as a whole, or not at all.

    It is in a folder of its own, beside the file, which goes with all that is left in it.

    Raises:
        RunError: the system refuses to write.
    """
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as scratch:
            written = Path(scratch) / file.name
            yield written
            with written.open("rb") as done:
                os.fsync(done.fileno())
            os.replace(written, file)
    except OSError as error:
        raise RunError(f"{file}: cannot be written: {error.strerror or error}") from error


def write_model(model: nn.Module, example: Tensor, file: Path, format: str, what: str) -> None:
    """Writes a model, with a free batch size.

    Args:
        model: in eval mode, on the CPU.
        example: one image that it takes, [1, C, H, W].
        file: to write.
        format: a key of `FORMATS`.
        what: is exported, in errors.

    Raises:
        RunError: the model cannot be exported.
    """
    with _expressed(format, what), silent():
        FORMATS[format][0](model, example.expand(_TRACED, -1, -1, -1).contiguous(), file)


def write_checked(model: nn.Module, example: Tensor, file: Path, format: str, what: str) -> float:
    """`write_model`, which reads the file back and compares the outputs.

    Returns:
        See `export_model`.

    Raises:
        RunError: the model cannot be exported, or the outputs differ by more than `LIMIT`.
    """
    write_model(model, example, file, format, what)
    with _expressed(format, what), silent():
        difference = _difference(model, FORMATS[format][1](file), example)
    if not difference <= LIMIT:  # NaN too
        raise RunError(
            f"{what}: expected the outputs of the model within {LIMIT:g} of the largest, found that {format} differs "
            f"by {difference:.1e}; nothing was written"
        )
    return difference


@contextlib.contextmanager
def _expressed(format: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # whatever an exporter makes of the user's network
        raise RunError(f"{what}: {format} cannot express this model: {first_line(error)}") from error


def check_packages() -> None:
    """Refuses ONNX where its packages are not installed.

    Raises:
        InputError: with the one that is missing.
    """
    missing = missing_package()
    if missing is not None:
        raise InputError(f"--format: expected onnx with its packages: {INSTALL}, found no {missing}")


def check_file(file: Path) -> None:
    """Refuses a file to write that is there, or whose folder cannot be written to.

    Raises:
        InputError: in one line.
    """
    if file.exists():
        raise InputError(f"--output: expected a new file, found {file}, which exists")
    if not file.parent.is_dir():
        raise InputError(f"--output: expected a file in a folder that exists, found {file}")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise InputError(f"--output: expected a folder that can be written to, found {file.parent}")


def _difference(model: nn.Module, run: Runner, example: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    differences = []
    with torch.no_grad():
        for size in BATCHES:
            images = torch.randn(size, *example.shape[1:], generator=generator)
            differences.append(output_difference([model(images)], [run(images)])[1])
    return max(differences, key=lambda value: (value != value, value))


def _write_torch(model: nn.Module, images: Tensor, file: Path) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with file.open("wb") as stream:  # of any name: given a path, torch wants it to end in .pt2
        torch.export.save(program, stream)


def _read_torch(file: Path) -> Runner:
    with file.open("rb") as stream:
        return torch.export.load(stream).module()


def _write_onnx(model: nn.Module, images: Tensor, file: Path) -> None:
    program = torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["images"],
        output_names=["scores"], verbose=False,
    )  # fmt: skip
    assert program is not None  # what dynamo=True returns
    program.save(file, external_data=False)


class OnnxModel(nn.Module):
    """An ONNX file that this package wrote, in ONNX Runtime on the CPU, with as many threads as torch uses.

    A module, so that it can be evaluated like the network that it was.

    Args:
        file: with an input ``images``, float32 [N, C, H, W], and an output ``scores``.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._session = session(str(file))

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(["scores"], {"images": images.numpy()})[0])


# How a format is written, and how it is read back.
FORMATS: dict[str, tuple[Callable[[nn.Module, Tensor, Path], None], Callable[[Path], Runner]]] = {
    "onnx": (_write_onnx, OnnxModel),
    "torch": (_write_torch, _read_torch),
}

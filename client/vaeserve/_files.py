"""The files of the command line: images and arrays in, arrays and PNGs out, each output whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from vaeserve._results import Array, Encoding, ModelInfo, ModelRef

if TYPE_CHECKING:
    from types import ModuleType

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_PNG_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_GRID_GAP_PIXELS = 2


class FileProblem(Exception):  # noqa: N818  a problem to tell in one line, not a fault
    """A file that cannot be used; the message names it and says what to do."""


class OutputProblem(FileProblem):
    """An output whose name alone says that it cannot be written: the command line is wrong, whatever is on the disk."""


def read_images(path: Path, info: ModelInfo, *, resize: bool) -> Array | Iterator[Any]:
    """Return a file's images: an array (memory-mapped where possible), or an iterator of PIL images.

    A folder's image files come in the order of `list_pictures`. Raises FileProblem naming a file that is unreadable
    or, without `resize`, of another size than the model's.
    """
    if path.suffix == ".npy":
        return _load(path)
    if path.suffix == ".npz":
        return pick_array(path, "images")
    return (_read_picture(each, info, resize) for each in list_pictures(path))


def list_pictures(path: Path) -> list[Path]:
    """Return an image file itself, or a folder's image files by name, those of its folders included."""
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.rglob("*") if each.suffix.lower() in PICTURE_SUFFIXES and each.is_file())
    if not found:
        raise FileProblem(f"{path}: no image files in it; it must have {', '.join(sorted(PICTURE_SUFFIXES))} files")
    return found


def pick_array(path: Path, name: str) -> Array:
    """Return one array of an .npz file: the one of that name, or its only one."""
    arrays = _load_all(path)
    if name in arrays:
        return arrays[name]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise FileProblem(f"{path}: no array named {name}; it has {', '.join(sorted(arrays)) or 'none at all'}")


def read_codes(path: Path, which: str) -> tuple[Array, ModelRef]:
    """Return latents and the model they belong to, as far as the file says: `which` of what `vaeserve encode` wrote."""
    if path.suffix == ".npy":
        return _load(path), ModelRef()
    if path.suffix != ".npz":
        raise FileProblem(f"{path}: latents are read from .npy and .npz files, such as `vaeserve encode` writes")
    arrays = _load_all(path)
    model = ModelRef(*(str(arrays.get(f"model_{part}", "")) for part in ("name", "version", "digest")))
    return pick_array(path, which), model


def write_codes(path: Path, codes: Encoding, files: Sequence[Path] = ()) -> None:
    """Write an Encoding as .npz (everything, and the image files' names) or .npy (the means alone)."""
    if path.suffix == ".npy":
        _write_whole(path, lambda file: np.save(file, codes.mean))
        return
    arrays: dict[str, Any] = {"mean": codes.mean, "stddev": codes.stddev}
    if codes.latents is not None:
        arrays |= {"latents": codes.latents, "seed": np.uint64(codes.seed or 0)}
    model = codes.model
    arrays |= {"model_name": model.name, "model_version": model.version, "model_digest": model.digest}
    if files:
        arrays["files"] = np.array([str(each) for each in files])
    _write_whole(path, lambda file: np.savez(file, **arrays))


def check_output(path: Path, suffixes: Sequence[str], *, folder: bool = False) -> None:
    """Raise OutputProblem now, before any work, if `path` is no name of these kinds, FileProblem if it is taken."""
    if not path.parent.is_dir():
        raise FileProblem(f"{path}: there is no folder {path.parent}; make it first")
    if folder and path.suffix == "":
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileProblem(f"{path}: exists and is not an empty folder; name another")
    elif path.suffix not in suffixes:
        kinds = " or ".join([*suffixes, "a folder (no suffix)"] if folder else suffixes)
        raise OutputProblem(f"{path}: cannot write {path.suffix or 'a file without suffix'}; name {kinds}")
    elif path.is_dir():
        raise FileProblem(f"{path}: is a folder; name a file")


def write_images(path: Path, images: Array, **more: Any) -> None:
    """Write images `(N, C, H, W)` as .npy, .npz (with `more`), one .png (a grid), or a folder of PNGs."""
    if path.suffix == ".npy":
        _write_whole(path, lambda file: np.save(file, images))
    elif path.suffix == ".npz":
        _write_whole(path, lambda file: np.savez(file, images=images, **more))
    elif path.suffix == ".png":
        grid = _as_picture(_grid(images))
        _write_whole(path, lambda file: grid.save(file, format="PNG"))
    else:
        _write_folder(path, images)


def needs_pixels(path: Path) -> bool:
    """Tell whether an output is made of PNGs, which take uint8 images."""
    return path.suffix in {".png", ""}


def pillow() -> ModuleType:
    """Return PIL.Image; FileProblem says what to install where it is missing."""
    try:
        from PIL import Image  # noqa: PLC0415  an extra
    except ImportError:
        raise FileProblem("image files need Pillow: pip install 'vaeserve[cli]' (.npy and .npz do without)") from None
    return Image


def _read_picture(path: Path, info: ModelInfo, resize: bool) -> Any:
    image = pillow()
    _, height, width = info.image_shape
    try:
        with image.open(path) as picture:
            picture.load()
    except FileNotFoundError:
        raise FileProblem(f"{path}: no such file or folder") from None
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's words for damaged files are of all these kinds
        raise FileProblem(f"{path}: not a readable image ({_one_line(error)})") from None
    if picture.size == (width, height):
        return picture
    if not resize:
        given = f"{picture.width} x {picture.height}"
        raise FileProblem(
            f"{path}: is {given} pixels; model {info.ref} takes {width} x {height}; add --resize to scale to that"
        )
    mode = _PNG_MODES.get(info.image_shape[0], picture.mode)  # before resizing: palette indices do not mix
    return picture.convert(mode).resize((width, height), image.Resampling.LANCZOS)


def _load(path: Path) -> Array:
    """Return an .npy file's array without reading it: bulk work takes its rows as it goes."""
    try:
        array: Array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise FileProblem(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise FileProblem(f"{path}: not a readable .npy file ({_one_line(error)})") from None
    return array


def _load_all(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise FileProblem(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:  # TypeError: an .npy inside
        raise FileProblem(f"{path}: not a readable .npz file ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write beside `path` and rename: a reader sees the old file or the whole new one."""
    with _failure_named(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()
            raise


def _write_folder(path: Path, images: Array) -> None:
    """Write one numbered PNG for each image into a new folder that appears when all are there."""
    digits = max(5, len(str(len(images) - 1)))
    with _failure_named(path):
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            for row, pixels in enumerate(images):
                _as_picture(pixels).save(scratch / f"{row:0{digits}d}.png")
            scratch.chmod(0o777 & ~_umask())
            scratch.replace(path)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


@contextlib.contextmanager
def _failure_named(path: Path) -> Iterator[None]:
    """Turn an OSError into a FileProblem that names `path`: NumPy's own words for a full disk name nothing."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{_one_line(error)}; is the disk full?"
        raise FileProblem(f"{path}: cannot be written ({reason}); nothing half-written was left") from None


def _grid(images: Array) -> Array:
    """Return uint8 images `(N, C, H, W)` side by side as one `(C, H', W')`, about as wide as high."""
    count, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    step_y, step_x = height + _GRID_GAP_PIXELS, width + _GRID_GAP_PIXELS
    grid = np.zeros((channels, rows * step_y - _GRID_GAP_PIXELS, columns * step_x - _GRID_GAP_PIXELS), np.uint8)
    for index, pixels in enumerate(images):
        top, left = index // columns * step_y, index % columns * step_x
        grid[:, top : top + height, left : left + width] = pixels
    return grid


def _as_picture(pixels: Array) -> Any:
    """Return uint8 `(C, H, W)` as a PIL image."""
    channels = pixels.shape[0]
    if channels not in _PNG_MODES:
        raise FileProblem(f"a PNG cannot hold {channels} channels; write .npy or .npz")
    rows = pixels[0] if channels == 1 else np.moveaxis(pixels, 0, -1)
    return pillow().fromarray(np.ascontiguousarray(rows))


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it; the command line has one thread here."""
    umask = os.umask(0)
    os.umask(umask)
    return umask

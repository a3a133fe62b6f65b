"""Read a user's folder of images into one array, and lose none of them silently.

People's folders hold photographs of any size, with orientation tags, with transparency, truncated downloads and files
that are no images. Every image is brought to the model's shape in one documented way; every file that cannot be is
named with its reason, and then either left out and counted or refused, as the user chose.
"""

from __future__ import annotations

import logging
import math
import os
import stat
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vaeserve_training.sources import DataError

_log = logging.getLogger(__name__)

# Only formats whose decoders are plain and common: others would let a file choose an exotic decoder.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"})
MAX_IMAGE_PIXELS = 64_000_000  # 8000 x 8000; a small file can unpack to far more
MAX_FILE_BYTES = 2**29
_MAX_UINT16 = 65535
_TOLD = 20  # bad files that the log names one by one
_READ_AHEAD = 16  # files a thread


@dataclass(frozen=True)
class FolderImages:
    """The readable images of a folder, in the order of their relative paths."""

    images: NDArray[np.uint8]  # (N, C, H, W)
    classes: list[str | None]  # first subfolder of each image, None for an image that lies in the folder itself
    skipped: tuple[str, ...]  # "path: reason" of each bad image


def read_folder(root: Path, image_shape: tuple[int, int, int], on_bad_image: Literal["skip", "fail"]) -> FolderImages:
    """Read every image below `root`, (N, C, H, W) with (C, H, W) = `image_shape`, C = 1 (grey) or 3 (colour).

    Hidden files and folders are passed over, and so are links to folders, which may lead in circles. Raises DataError
    if there is no such folder, if it holds no readable image, if its images do not fit into memory, and with "fail" on
    the first image that cannot be read.
    """
    if image_shape[0] not in (1, 3):
        raise DataError(f"image_shape is {list(image_shape)}; a folder's images have 1 channel (grey) or 3 (colour)")
    names = _list_images(root)
    try:
        images = np.empty((len(names), *image_shape), dtype=np.uint8)
    except MemoryError:
        size = len(names) * math.prod(image_shape) / 2**30
        raise DataError(
            f"{root} holds {len(names)} images, which take {size:.1f} GiB of memory as {list(image_shape)}: more than "
            "there is. Choose a smaller data.image_shape, or a folder with fewer of them"
        ) from None
    kept: list[str] = []
    skipped: list[str] = []
    with warnings.catch_warnings(), closing(_read_all(root, names, image_shape)) as results:
        # Our own limit is below Pillow's first one, so its warning would only say the same.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for name, result in zip(names, results, strict=True):
            if isinstance(result, str):
                problem = f"{root / name}: {result}"
                if on_bad_image == "fail":
                    raise DataError(f"{problem}. Remove the file, or leave such files out: --data.on-bad-image skip")
                if len(skipped) < _TOLD:
                    _log.warning("left out: %s", problem)
                skipped.append(problem)
            else:
                images[len(kept)] = result
                kept.append(name)
    if len(skipped) > _TOLD:
        _log.warning("left out: %d more files; `vaeserve-train data` names them all", len(skipped) - _TOLD)
    if not kept:
        raise DataError(f"{root} holds no readable image; {len(skipped)} cannot be read, e.g. {skipped[0]}")
    return FolderImages(images[: len(kept)], [_class_of(name) for name in kept], tuple(skipped))


def read_image(path: Path, image_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return one image as (C, H, W) = `image_shape`.

    The orientation tag is respected and transparency composited on white, as on paper. An image of another size is
    scaled with a Lanczos filter until it covers H x W, its proportions kept, and cropped about its centre. Of an
    animation it is the first picture. Raises whatever Pillow does on a damaged file, and ValueError for what is no
    plain file, or larger than MAX_FILE_BYTES or MAX_IMAGE_PIXELS.
    """
    channels, height, width = image_shape
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ValueError("no plain file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"{status.st_size} bytes; at most {MAX_FILE_BYTES} are read")
    with path.open("rb") as file, Image.open(file, formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{opened.width} x {opened.height} pixels; at most {MAX_IMAGE_PIXELS} are read")
        image = _as_8_bit(ImageOps.exif_transpose(opened), opened.format).convert("RGB" if channels == 3 else "L")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
        pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _read_all(
    root: Path, names: Sequence[str], image_shape: tuple[int, int, int]
) -> Generator[NDArray[np.uint8] | str]:
    """Yield each image, or the reason why it cannot be read, in the order of `names`."""

    def read_or_reason(name: str) -> NDArray[np.uint8] | str:
        try:
            return read_image(root / name, image_shape)
        except UnidentifiedImageError:
            return f"cannot identify image file; it is none of {', '.join(FORMATS)}"
        except MemoryError:
            return "there is too little memory to read it"
        except OSError as error:
            return error.strerror or f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001 - decoders raise anything on damaged files; the caller reports it
            return f"{type(error).__name__}: {error}"

    # Pillow decodes and scales outside the interpreter's lock. Only so many are read ahead, however many there are.
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=threads) as pool:
        ahead: deque[Future[NDArray[np.uint8] | str]] = deque()
        try:
            for name in names:
                ahead.append(pool.submit(read_or_reason, name))
                if len(ahead) > _READ_AHEAD * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _as_8_bit(image: Image.Image, file_format: str | None) -> Image.Image:
    """Return the image with 8 bits a channel and no transparency; ValueError if its range is unknown."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Pillow reads a PPM file of more than 8 bits as 32-bit integers, scaled to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PPM"):
        values = np.asarray(image).astype(np.float64) * (255 / _MAX_UINT16)
        return Image.fromarray(np.rint(values).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise ValueError(f"pixels of mode {image.mode} have no fixed range; save the image with 8 or 16 bits")
    return image


def _list_images(root: Path) -> list[str]:
    """Return the files below `root` that are named as images, as relative paths with slashes, sorted."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder; name one that holds images")
    images: list[str] = []
    others = links = 0
    example = ""
    for folder, subfolders, names in os.walk(root, onerror=_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        links += sum(Path(folder, name).is_symlink() for name in subfolders)
        below = Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        for name in names:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122 - ten times as fast, a million times
                images.append(prefix + name)
            else:
                others += 1
                example = min(example or prefix + name, prefix + name)
    if others:
        _log.warning("%d files in %s are not named as images and not read, e.g. %s", others, root, root / example)
    if links:
        _log.warning("%d links to folders in %s are not followed", links, root)
    if not images:
        raise DataError(f"{root} holds no images; known endings are {', '.join(sorted(SUFFIXES))}")
    images.sort()
    return images


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def _class_of(name: str) -> str | None:
    folder, slash, _ = name.partition("/")
    return folder if slash else None

"""Read a user's folder of images into one array, and lose none of them silently.

People's folders hold photographs of any size, with orientation tags, with transparency, truncated downloads and files
that are no images. Every image is brought to the model's shape in one documented way; every file that cannot be is
named with its reason, and then either left out and counted or refused, as the user chose.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vaeserve_training.sources import DataError

_log = logging.getLogger(__name__)

# Only formats whose decoders are plain and common: others would let a file choose an exotic decoder.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"})
MAX_IMAGE_PIXELS = 64_000_000  # 8000 x 8000; a small file can unpack to far more
_MAX_UINT16 = 65535


@dataclass(frozen=True)
class FolderImages:
    """The readable images of a folder, in the order of their relative paths."""

    images: NDArray[np.uint8]  # (N, C, H, W)
    classes: list[str | None]  # first subfolder of each image, None for an image that lies in the folder itself
    skipped: tuple[str, ...]  # "path: reason" of each bad image


def read_folder(root: Path, image_shape: tuple[int, int, int], on_bad_image: Literal["skip", "fail"]) -> FolderImages:
    """Read every image below `root`, (N, C, H, W) with (C, H, W) = `image_shape`, C = 1 (grey) or 3 (colour).

    Hidden files and folders are passed over. Raises DataError if there is no such folder, if it holds no readable
    image, and with "fail" on the first image that cannot be read.
    """
    if image_shape[0] not in (1, 3):
        raise DataError(f"image_shape is {list(image_shape)}; a folder's images have 1 channel (grey) or 3 (colour)")
    paths = _list_images(root)
    images = np.empty((len(paths), *image_shape), dtype=np.uint8)
    kept: list[Path] = []
    skipped: list[str] = []
    with warnings.catch_warnings(), closing(_read_all(paths, image_shape)) as results:
        # Our own limit is below Pillow's first one, so its warning would only say the same.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for path, result in zip(paths, results, strict=True):
            if isinstance(result, str):
                problem = f"{path}: {result}"
                if on_bad_image == "fail":
                    raise DataError(f"{problem}. Remove the file, or leave such files out: --data.on-bad-image skip")
                _log.warning("left out: %s", problem)
                skipped.append(problem)
            else:
                images[len(kept)] = result
                kept.append(path)
    if not kept:
        raise DataError(f"{root} holds no readable image; {len(skipped)} cannot be read, e.g. {skipped[0]}")
    return FolderImages(images[: len(kept)], [_class_of(path, root) for path in kept], tuple(skipped))


def read_image(path: Path, image_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return one image as (C, H, W) = `image_shape`.

    The orientation tag is respected and transparency composited on white, as on paper. An image of another size is
    scaled with a Lanczos filter until it covers H x W, its proportions kept, and cropped about its centre. Raises
    whatever Pillow does on a damaged file, and ValueError for more than MAX_IMAGE_PIXELS.
    """
    channels, height, width = image_shape
    with Image.open(path, formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{opened.width} x {opened.height} pixels; at most {MAX_IMAGE_PIXELS} are read")
        image = _as_8_bit(ImageOps.exif_transpose(opened), opened.format).convert("RGB" if channels == 3 else "L")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
        pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _read_all(paths: list[Path], image_shape: tuple[int, int, int]) -> Generator[NDArray[np.uint8] | str]:
    """Yield each image, or the reason why it cannot be read, in the order of `paths`."""

    def read_or_reason(path: Path) -> NDArray[np.uint8] | str:
        try:
            return read_image(path, image_shape)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - decoders raise anything on damaged files; the caller reports it
            return f"{type(error).__name__}: {error}"

    # Pillow decodes and scales outside the interpreter's lock.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(read_or_reason, paths)


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


def _list_images(root: Path) -> list[Path]:
    """Return the files below `root` that are named as images, sorted by relative path."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder; name one that holds images")
    images: list[Path] = []
    others: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name)
                (images if path.suffix.lower() in SUFFIXES else others).append(path)
    if others:
        _log.warning("%d files in %s are not named as images and not read, e.g. %s", len(others), root, min(others))
    if not images:
        raise DataError(f"{root} holds no images; known endings are {', '.join(sorted(SUFFIXES))}")
    return sorted(images, key=lambda path: path.relative_to(root).as_posix())


def _class_of(path: Path, root: Path) -> str | None:
    parts = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else None

"""People's folders of images: any size, mode, orientation and transparency; damaged files named, never lost."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vaeserve_training import image_folder
from vaeserve_training.config import DataConfig
from vaeserve_training.data import ImageData, load
from vaeserve_training.image_folder import read_image
from vaeserve_training.sources import DataError

GREY = (1, 8, 8)
COLOUR = (3, 8, 8)


def images(count: int, *, channels: int = 3, size: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    """Return different images, (N, H, W, C)."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def write(path: Path, pixels: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path)
    return path


def fill(root: Path, count: int = 10) -> NDArray[np.uint8]:
    pixels = images(count)
    for number, image in enumerate(pixels):
        write(root / f"{number:02}.png", image)
    return pixels


def load_folder(root: Path, **changes: object) -> ImageData:
    return load(DataConfig.model_validate({"dataset": "folder", "path": root, "image_shape": COLOUR} | changes))


def as_rows(array: NDArray[np.uint8]) -> set[bytes]:
    return {image.tobytes() for image in array}


def test_every_image_is_in_exactly_one_part_with_its_pixels(tmp_path: Path) -> None:
    pixels = fill(tmp_path).transpose(0, 3, 1, 2)
    data = load_folder(tmp_path, test_fraction=0.2)
    assert data.train.shape == (8, *COLOUR)
    assert data.test.shape == (2, *COLOUR)
    assert data.train.dtype == data.test.dtype == np.uint8
    assert as_rows(data.train) | as_rows(data.test) == {image.tobytes() for image in pixels}
    assert (data.train_labels, data.test_labels, data.binarised) == (None, None, False)


def test_the_order_is_that_of_the_relative_paths(tmp_path: Path) -> None:
    pixels = images(3)
    for name, image in zip(["b/1.png", "a/2.png", "a/10.png"], pixels, strict=True):
        write(tmp_path / name, image)
    folder = image_folder.read_folder(tmp_path, COLOUR, "fail")
    assert np.array_equal(folder.images, pixels[[2, 1, 0]].transpose(0, 3, 1, 2))
    assert folder.classes == ["a", "a", "b"]


def test_the_split_is_the_seed_s_and_knows_no_names(tmp_path: Path) -> None:
    fill(tmp_path / "first")
    for path in (tmp_path / "first").iterdir():
        write(tmp_path / "second" / f"{99 - int(path.stem)}.png", np.asarray(Image.open(path)))
    first, renamed = load_folder(tmp_path / "first"), load_folder(tmp_path / "second")
    assert as_rows(first.test) == as_rows(renamed.test)
    assert load_folder(tmp_path / "first").sha256 == first.sha256
    others = {load_folder(tmp_path / "first", seed=seed).sha256 for seed in range(1, 6)}
    assert others != {first.sha256}


def test_adding_images_moves_few_across_the_split(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    before = load_folder(tmp_path, test_fraction=0.5)
    for number, image in enumerate(images(4, seed=1)):
        write(tmp_path / f"new-{number}.png", image)
    after = load_folder(tmp_path, test_fraction=0.5)
    assert len(as_rows(before.test) & as_rows(after.train)) <= 2
    assert len(as_rows(before.train) & as_rows(after.test)) <= 4


def test_labels_are_the_subfolders(tmp_path: Path) -> None:
    pixels = images(6)
    for number, image in enumerate(pixels):
        write(tmp_path / ("cat" if number % 2 else "ant") / f"{number}.png", image)
    data = load_folder(tmp_path, test_fraction=0.5)
    assert data.train_labels is not None
    assert data.test_labels is not None
    found = dict(zip([image.tobytes() for image in data.train], data.train_labels, strict=True))
    found |= dict(zip([image.tobytes() for image in data.test], data.test_labels, strict=True))
    expected = {image.transpose(2, 0, 1).tobytes(): number % 2 for number, image in enumerate(pixels)}
    assert found == expected


def test_folders_called_train_and_test_are_the_split_and_no_classes(tmp_path: Path) -> None:
    pixels = images(3)
    write(tmp_path / "train" / "b" / "0.png", pixels[0])
    write(tmp_path / "train" / "a" / "1.png", pixels[1])
    write(tmp_path / "test" / "b" / "2.png", pixels[2])
    data = load_folder(tmp_path)
    assert np.array_equal(data.train, pixels[[1, 0]].transpose(0, 3, 1, 2))
    assert np.array_equal(data.test, pixels[[2]].transpose(0, 3, 1, 2))
    assert data.train_labels is not None
    assert data.test_labels is not None
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 1], [1])


def test_other_sizes_are_covered_and_cropped_in_proportion(tmp_path: Path) -> None:
    wide = np.zeros((16, 64, 3), dtype=np.uint8)
    wide[:, 24:40] = (255, 0, 0)  # the central square, which is what remains
    pixels = read_image(write(tmp_path / "wide.png", wide), COLOUR)
    assert pixels.shape == COLOUR
    red = np.array([255, 0, 0]).reshape(3, 1, 1)
    assert np.abs(pixels[:, :, 2:6].astype(int) - red).max() <= 2  # the filter's own small ripples


def test_colour_becomes_grey_and_grey_becomes_colour(tmp_path: Path) -> None:
    red = write(tmp_path / "red.png", np.full((8, 8, 3), (255, 0, 0), dtype=np.uint8))
    grey = write(tmp_path / "grey.png", np.full((8, 8), 77, dtype=np.uint8))
    assert np.array_equal(read_image(red, GREY), np.full(GREY, 76))  # ITU-R 601 luma of red
    assert np.array_equal(read_image(grey, COLOUR), np.full(COLOUR, 77))


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:4, :, 3] = 255  # upper half opaque black, lower half transparent black
    colour = read_image(write(tmp_path / "alpha.png", pixels), GREY)
    assert (np.unique(colour[0, :4]), np.unique(colour[0, 4:])) == ([0], [255])
    palette = Image.fromarray(np.zeros((8, 8), dtype=np.uint8), mode=None).convert("P")
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.array_equal(read_image(tmp_path / "palette.png", GREY), np.full(GREY, 255))


def test_the_orientation_tag_is_respected(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[0] = 255  # a bright line on top, stored so; orientation 6 says that it is the right edge
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    expected = np.zeros(GREY, dtype=np.uint8)
    expected[0, :, -1] = 255
    assert np.array_equal(read_image(tmp_path / "turned.png", GREY), expected)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_16_bits_are_scaled_and_not_clipped(name: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name, GREY)[0], np.rint(values / 257).astype(np.uint8))


def test_pixels_without_a_fixed_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="mode F have no fixed range"):
        read_image(tmp_path / "float.tif", GREY)


def png_that_claims(width: int, height: int) -> bytes:
    """Return a tiny PNG file whose header announces a huge image."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(header) - 4) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


BAD_FILES = {
    "text.png": (b"this is no image", "cannot identify image file"),
    "empty.jpg": (b"", "cannot identify image file"),
    "large.png": (png_that_claims(9000, 9000), "at most 64000000 are read"),
    "huge.png": (png_that_claims(60000, 60000), "DecompressionBombError"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot identify image file"),
}


@pytest.mark.parametrize("name", [*BAD_FILES, "truncated.png"])
def test_a_bad_image_is_named_and_refused_or_left_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = fill(tmp_path)
    whole = (tmp_path / "00.png").read_bytes()
    content, reason = BAD_FILES.get(name, (whole[: len(whole) // 2], "truncated"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name) as caught:
        load_folder(tmp_path)
    assert reason in str(caught.value)
    assert "--data.on-bad-image skip" in str(caught.value)
    data = load_folder(tmp_path, on_bad_image="skip")
    assert as_rows(data.train) | as_rows(data.test) == as_rows(pixels.transpose(0, 3, 1, 2))
    assert len(data.skipped) == 1
    assert str(tmp_path / name) in data.skipped[0]
    assert reason in data.skipped[0]
    assert data.skipped[0] in caplog.text


def test_skipping_every_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no readable image; 1 cannot be read, e\.g\. .*bad\.png"):
        load_folder(tmp_path, on_bad_image="skip")


def test_files_that_are_named_otherwise_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_bytes(b"not an image either, and none of ours")
    assert len(load_folder(tmp_path).train) == 9
    assert f"1 files in {tmp_path} are not named as images" in caplog.text
    assert "notes.txt" in caplog.text


def test_a_folder_that_is_missing_or_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder; name one that holds images"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no images; known endings are"):
        load_folder(tmp_path)


def test_a_split_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    with pytest.raises(DataError, match=r"3 images with test_fraction 0\.1 leave 0 for the test"):
        load_folder(tmp_path)


def test_two_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"image_shape is \[2, 8, 8\]; a folder's images have 1 channel"):
        load_folder(tmp_path, image_shape=(2, 8, 8))

"""Training data made to harm, or merely strange: bombs, pipes, circles, lies and crowds. Named, and bounded."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaeserve_training import image_folder
from vaeserve_training.arrays import read_arrays
from vaeserve_training.config import DataConfig
from vaeserve_training.data import ImageData, load
from vaeserve_training.image_folder import read_folder, read_image
from vaeserve_training.sources import DataError

GREY, COLOUR = (1, 8, 8), (3, 8, 8)
MIB = 2**20


def load_folder(root: Path, **changes: object) -> ImageData:
    return load(DataConfig.model_validate({"dataset": "folder", "path": root, "image_shape": COLOUR} | changes))


def picture(colour: tuple[int, int, int] = (200, 100, 50), size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def fill(root: Path, count: int = 10) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture((number, 2 * number, 255 - number)).save(root / f"{number:02}.png")


def the_bad_one(root: Path, name: str) -> str:
    """Load the folder; return why that file was left out, and check that all others were read."""
    with pytest.raises(DataError) as refused:
        load_folder(root)
    assert str(refused.value).startswith(f"{root / name}: ")
    assert "\n" not in str(refused.value)
    data = load_folder(root, on_bad_image="skip")
    assert len(data.train) + len(data.test) == 10
    (problem,) = data.skipped
    assert problem.startswith(f"{root / name}: ")
    return problem


# Bombs.


def png(width: int, height: int, pixels: bytes) -> bytes:
    """Return a sound PNG file of 1-bit grey pixels, whose compressed rows are given."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_a_small_file_of_900_million_pixels_is_not_unpacked(tmp_path: Path) -> None:
    fill(tmp_path)
    rows = zlib.compressobj(9)
    row = bytes(1 + 30_000 // 8) * 100
    pixels = b"".join(rows.compress(row) for _ in range(300)) + rows.flush()
    (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000, pixels))
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "DecompressionBombError" in the_bad_one(tmp_path, "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 50 * 1024


def test_a_giant_file_is_not_read(tmp_path: Path) -> None:
    fill(tmp_path)
    shutil.copy(tmp_path / "00.png", tmp_path / "giant.png")
    with (tmp_path / "giant.png").open("ab") as file:
        file.truncate(2**40)  # a hole: no disk is filled
    assert "1099511627776 bytes; at most 536870912 are read" in the_bad_one(tmp_path, "giant.png")


@pytest.mark.parametrize("kind", ["zTXt", "iCCP"])
def test_a_bomb_in_a_pngs_text_is_not_unpacked(tmp_path: Path, kind: str) -> None:
    bomb = b"name\0\0" + zlib.compress(bytes(200 * MIB))
    small = io.BytesIO()
    picture().save(small, format="PNG")
    start = small.getvalue()
    chunk = struct.pack(">I", len(bomb)) + kind.encode() + bomb + struct.pack(">I", zlib.crc32(kind.encode() + bomb))
    (tmp_path / "bomb.png").write_bytes(start[:33] + chunk + start[33:])  # behind the header
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ValueError, OSError):
        read_image(tmp_path / "bomb.png", COLOUR)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 50 * 1024


# Formats.


def test_the_content_decides_and_not_the_ending(tmp_path: Path) -> None:
    picture().save(tmp_path / "jpeg.png", format="JPEG", quality=100)
    assert np.abs(read_image(tmp_path / "jpeg.png", COLOUR)[:, 0, 0].astype(int) - [200, 100, 50]).max() < 4


@pytest.mark.parametrize(
    "content", [b"<html></html>", b"%PDF-1.7", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF____WEBP", b"MZ"]
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(content)
    the_bad_one(tmp_path, "bad.jpg")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tif", "webp", "ppm"])
def test_half_a_file_is_never_taken_for_a_whole(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"half.{suffix}")
    whole = (tmp_path / f"half.{suffix}").read_bytes()
    (tmp_path / f"half.{suffix}").write_bytes(whole[: len(whole) // 2])
    the_bad_one(tmp_path, f"half.{suffix}")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path, suffix: str) -> None:
    pictures = [picture((255, 0, 0)), picture((0, 255, 0)), picture((0, 0, 255))]
    options = {"lossless": True} if suffix == "webp" else {}
    pictures[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=pictures[1:], **options)
    with Image.open(tmp_path / f"moving.{suffix}") as opened:
        assert opened.n_frames == 3  # type: ignore[attr-defined]
    assert read_image(tmp_path / f"moving.{suffix}", COLOUR)[:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("mode", "suffix"), [("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"), ("P", "png"), ("1", "png"), ("LA", "png")]
)
def test_every_common_mode_becomes_colour(tmp_path: Path, mode: str, suffix: str) -> None:
    picture((255, 255, 255)).convert(mode).save(tmp_path / f"white.{suffix}")
    picture((0, 0, 0)).convert(mode).save(tmp_path / f"black.{suffix}")
    assert read_image(tmp_path / f"white.{suffix}", COLOUR).min() > 250
    assert read_image(tmp_path / f"black.{suffix}", COLOUR).max() < 5


def test_sizes_may_be_mixed(tmp_path: Path) -> None:
    for number, size in enumerate((1, 3, 8, 50, 400)):
        picture(size=size).save(tmp_path / f"{number}.png")
    images = read_folder(tmp_path, COLOUR, "fail").images
    assert images.shape == (5, *COLOUR)
    assert np.abs(images.astype(int) - np.array([200, 100, 50]).reshape(3, 1, 1)).max() <= 1


# Folders.


def test_links_that_lead_in_circles_are_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "images")
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "up").symlink_to("..")
    data = load_folder(tmp_path / "images")
    assert len(data.train) + len(data.test) == 10
    assert f"2 links to folders in {tmp_path / 'images'} are not followed" in caplog.text


@pytest.mark.parametrize("target", ["circle.png", "nowhere.png", "/dev/full", "/dev/zero", "/proc/self/mem"])
def test_a_link_to_no_image_is_named(tmp_path: Path, target: str) -> None:
    fill(tmp_path)
    (tmp_path / "circle.png").symlink_to(target)
    the_bad_one(tmp_path, "circle.png")


def test_a_pipe_holds_nothing_up(tmp_path: Path) -> None:
    fill(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert "no plain file" in the_bad_one(tmp_path, "pipe.png")


def test_names_of_any_bytes_are_read(tmp_path: Path) -> None:
    fill(tmp_path)
    for name in (b"\xff\xfe.png", b"new\nline.png", "ä ö.png".encode()):
        shutil.copy(tmp_path / "00.png", os.fsencode(tmp_path) + b"/" + name)
    data = load_folder(tmp_path)
    assert len(data.train) + len(data.test) == 13


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Be nobody for a while where this is root, whom no permission stops."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(0)


def test_an_unreadable_file_is_named(public: Path) -> None:
    fill(public / "images")
    shutil.copy(public / "images" / "00.png", public / "images" / "secret.png")
    (public / "images" / "secret.png").chmod(0)
    with unprivileged():
        assert "Permission denied" in the_bad_one(public / "images", "secret.png")


def test_an_unreadable_folder_is_not_taken_for_an_empty_one(public: Path) -> None:
    fill(public / "images" / "open")
    fill(public / "images" / "secret")
    (public / "images" / "secret").chmod(0)
    with unprivileged(), pytest.raises(DataError, match=r"images/secret cannot be read: Permission denied"):
        load_folder(public / "images", on_bad_image="skip")


def test_a_crowd_is_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 1)
    for number in range(3000):
        os.link(tmp_path / "00.png", tmp_path / f"x{number}.png")
    started = 0

    def count_and_read(path: Path, shape: tuple[int, int, int]) -> object:
        nonlocal started
        started += 1
        return read_image(path, shape)

    monkeypatch.setattr(image_folder, "read_image", count_and_read)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    results = image_folder._read_all(tmp_path, image_folder._list_images(tmp_path), COLOUR)
    next(results)
    results.close()
    assert 0 < started < 100
    assert len(read_folder(tmp_path, COLOUR, "fail").images) == 3001


def test_a_crowd_of_bad_files_is_counted_and_not_listed_without_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path)
    for number in range(500):
        (tmp_path / f"bad{number}.png").write_bytes(b"")
    data = load_folder(tmp_path, on_bad_image="skip")
    assert len(data.skipped) == 500
    assert len(caplog.records) < 30
    assert "left out: 480 more files" in caplog.text


def test_more_images_than_memory_holds_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(DataError, match=r"holds 10 images, which take 120000\.0 GiB of memory as \[3, 2"):
        read_folder(tmp_path, (3, 2**21, 2_048_000), "fail")


# Arrays.


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


class Harmful:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["evil.npy", "evil.npz"])
def test_arrays_of_objects_are_refused_unread(tmp_path: Path, name: str) -> None:
    harmful = np.array([Harmful(tmp_path / "touched")], dtype=object)
    if name.endswith("npy"):
        np.save(tmp_path / name, harmful, allow_pickle=True)
    else:
        np.savez(tmp_path / name, images=harmful)
    with pytest.raises(DataError, match=r"Object arrays cannot be loaded"):
        read_arrays(tmp_path / name)
    assert not (tmp_path / "touched").exists()


def test_a_pickle_named_as_an_array_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "evil.npy").write_bytes(pickle.dumps(Harmful(tmp_path / "touched")))
    with pytest.raises(DataError, match=r"cannot be read as an \.npy or \.npz file"):
        read_arrays(tmp_path / "evil.npy")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("shape", [(2**20, 1000, 1000), (2**62, 2**62), (20, 28, 28)])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_header_that_claims_more_than_there_is_is_refused(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    path = tmp_path / f"images.{kind}"
    content = header(shape) + bytes(100)
    if kind == "npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content)
    with pytest.raises(DataError, match=r"its header says uint8 \(.*\), \d+ bytes, but there are \d+"):
        read_arrays(path)


def test_an_npz_bomb_is_not_unpacked(tmp_path: Path) -> None:
    size = 5 * 2**30
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("images.npy", header((size // 784, 28, 28)) + bytes(100))
    # The directory's word for it, with which an honest bomb would come.
    content = (tmp_path / "bomb.npz").read_bytes()
    place = content.rindex(b"PK\x01\x02")
    claimed = struct.pack("<I", 2**32 - 2)
    (tmp_path / "bomb.npz").write_bytes(content[: place + 24] + claimed + content[place + 28 :])
    with pytest.raises(DataError, match=r"228 bytes that unpack to 4294967294 are no images"):
        read_arrays(tmp_path / "bomb.npz")


def test_an_archive_with_a_password_or_of_no_arrays_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "notes.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    with pytest.raises(DataError, match="cannot be read"):
        read_arrays(tmp_path / "notes.npz")
    content = bytearray((tmp_path / "notes.npz").read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1  # encrypted
    (tmp_path / "notes.npz").write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        read_arrays(tmp_path / "notes.npz")


def test_a_pipe_of_arrays_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "images.npy")
    with pytest.raises(DataError, match="it is no plain file"):
        read_arrays(tmp_path / "images.npy")

"""Every data set comes out as the same thing, with a digest, or with an error that says what to do."""

from __future__ import annotations

import gzip
import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vaeserve_training import mnist
from vaeserve_training.arrays import as_images
from vaeserve_training.config import DataConfig
from vaeserve_training.data import ImageData, load, summary
from vaeserve_training.sources import CanonicalFile, DataError

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8)
TEST = RNG.integers(0, 256, (6, 28, 28), dtype=np.uint8)


def idx(array: NDArray[np.uint8]) -> bytes:
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four small files, whose digests stand in for the published ones."""
    contents = {
        mnist.TRAIN_IMAGES: idx(TRAIN),
        mnist.TRAIN_LABELS: idx(np.arange(20, dtype=np.uint8) % 10),
        mnist.TEST_IMAGES: idx(TEST),
        mnist.TEST_LABELS: idx(np.arange(6, dtype=np.uint8)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = tuple(CanonicalFile(name, (hashlib.sha256(content).hexdigest(),)) for name, content in contents.items())
    monkeypatch.setitem(mnist.FILE_SETS, "mnist", replace(mnist.MNIST, files=files, mirrors=(), wheel=None))
    return tmp_path


def load_arrays(path: Path, **changes: object) -> ImageData:
    return load(DataConfig.model_validate({"dataset": "arrays", "path": path} | changes))


def save(path: Path, **arrays: NDArray[np.generic]) -> Path:
    np.savez(path, **arrays)
    return path


def test_mnist_from_its_four_files(small_mnist: Path) -> None:
    data = load(DataConfig(path=small_mnist, cache_dir=small_mnist / "cache"))
    assert np.array_equal(data.train, TRAIN[:, None])
    assert np.array_equal(data.test, TEST[:, None])
    assert data.train_labels is not None
    assert data.test_labels is not None
    assert data.train_labels.tolist() == [*range(10), *range(10)]
    assert data.test_labels.tolist() == [*range(6)]
    assert data.sha256 == hashlib.sha256(TRAIN.tobytes()).hexdigest()
    assert (data.name, data.binarised) == ("mnist", False)


def test_a_wrong_file_is_refused_before_it_is_read(small_mnist: Path) -> None:
    (small_mnist / mnist.TEST_IMAGES).write_bytes(b"not even gzip")
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: 13 bytes with SHA-256"):
        load(DataConfig(path=small_mnist, cache_dir=small_mnist / "cache"))


def test_another_shape_than_the_model_s_is_refused(small_mnist: Path) -> None:
    config = DataConfig(path=small_mnist, cache_dir=small_mnist / "cache", image_shape=(3, 32, 32))
    with pytest.raises(DataError, match=r"images of mnist have shape \[1, 28, 28\]; data.image_shape is \[3, 32, 32\]"):
        load(config)


def test_limits_take_the_first_images_and_change_the_digest(small_mnist: Path) -> None:
    config = DataConfig(path=small_mnist, cache_dir=small_mnist / "cache", limit_train=5, limit_test=2)
    data = load(config)
    assert np.array_equal(data.train, TRAIN[:5, None])
    assert np.array_equal(data.test, TEST[:2, None])
    assert data.train_labels is not None
    assert data.train_labels.tolist() == [*range(5)]
    assert data.sha256 == hashlib.sha256(TRAIN[:5].tobytes()).hexdigest()


def test_the_summary_says_what_was_loaded(small_mnist: Path) -> None:
    data = load(DataConfig(path=small_mnist, cache_dir=small_mnist / "cache"))
    said = summary(data)
    assert said["train_images"] == 20
    assert said["test_images"] == 6
    assert said["image_shape"] == [1, 28, 28]
    assert said["classes"] == 10
    assert said["sha256"] == data.sha256
    assert said["origins"] == [str(small_mnist / name) for name in sorted(path.name for path in small_mnist.iterdir())]


@pytest.mark.parametrize("dataset", ["folder", "arrays", "binarised-mnist"])
def test_a_data_set_of_the_user_s_own_needs_a_path(dataset: str) -> None:
    with pytest.raises(DataError, match=f"data set {dataset} needs data.path"):
        load(DataConfig.model_validate({"dataset": dataset}))


# Arrays


@pytest.mark.parametrize(
    ("train_name", "test_name", "train_labels", "test_labels"),
    [
        ("train_images", "test_images", "train_labels", "test_labels"),
        ("x_train", "x_test", "y_train", "y_test"),
        ("train", "test", "train_labels", "test_labels"),
    ],
)
def test_an_npz_with_both_parts(
    train_name: str, test_name: str, train_labels: str, test_labels: str, tmp_path: Path
) -> None:
    arrays = {train_name: TRAIN, test_name: TEST, train_labels: np.arange(20), test_labels: np.arange(6)}
    data = load_arrays(save(tmp_path / "own.npz", **arrays))
    assert np.array_equal(data.train, TRAIN[:, None])
    assert np.array_equal(data.test, TEST[:, None])
    assert data.train_labels is not None
    assert data.test_labels is not None
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([*range(20)], [*range(6)])


def test_an_npy_is_split_and_keeps_labels_with_their_images(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", TRAIN)
    unlabelled = load_arrays(tmp_path / "own.npy", test_fraction=0.25)
    labelled = load_arrays(save(tmp_path / "own.npz", images=TRAIN, labels=np.arange(20)), test_fraction=0.25)
    assert (unlabelled.train.shape, unlabelled.test.shape) == ((15, 1, 28, 28), (5, 1, 28, 28))
    assert np.array_equal(labelled.test, unlabelled.test), "the same images and seed give the same split"
    assert labelled.train_labels is not None
    assert labelled.test_labels is not None
    assert np.array_equal(labelled.train[:, 0], TRAIN[labelled.train_labels])
    assert np.array_equal(labelled.test[:, 0], TRAIN[labelled.test_labels])
    assert load_arrays(tmp_path / "own.npy", test_fraction=0.25, seed=1).sha256 != unlabelled.sha256


def test_copies_of_one_image_stay_on_one_side(tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", np.concatenate([TRAIN, TRAIN]))
    data = load_arrays(tmp_path / "own.npy", test_fraction=0.25)  # an even number is held out
    assert not {image.tobytes() for image in data.train} & {image.tobytes() for image in data.test}


def test_layouts_are_told_apart() -> None:
    channels_first = RNG.integers(0, 256, (5, 3, 16, 12), dtype=np.uint8)
    assert np.array_equal(as_images(channels_first, "x"), channels_first)
    channels_last = np.ascontiguousarray(channels_first.transpose(0, 2, 3, 1))
    given_last = as_images(channels_last, "x")
    assert np.array_equal(given_last, channels_first)
    assert given_last.flags.c_contiguous
    assert np.array_equal(as_images(channels_first[:, 0], "x"), channels_first[:, :1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_become_the_nearest_of_256_levels(dtype: type[np.floating]) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert np.array_equal(as_images((levels / 255).astype(dtype), "x")[:, 0], levels)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 784), np.uint8), r"x has shape \(5, 784\); expected \(N, H, W\)"),
        (np.zeros((0, 28, 28), np.uint8), r"x has shape \(0, 28, 28\)"),
        (np.zeros((5, 3, 28, 3), np.uint8), r"neither \(N, H, W, C\) nor \(N, C, H, W\) can be told"),
        (np.zeros((5, 28, 28, 28), np.uint8), r"expected 1 to 4 channels"),
        (np.zeros((5, 28, 28), np.int64), r"x is int64; expected uint8 \(0\.\.255\) or floating point"),
        (np.zeros((5, 28, 28), np.bool_), r"x is bool"),
        (np.full((5, 28, 28), 255.0), r"x: row 0 holds 255; floating-point pixels must be in 0\.\.1"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array: NDArray[np.generic], message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_images(array, "x")


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.001, 1.001])
def test_the_first_bad_row_is_named(value: float) -> None:
    array = np.zeros((5000, 8, 8), dtype=np.float32)
    array[4321, 3, 3] = value
    with pytest.raises(DataError, match=f"row 4321 holds {value:g}"):
        as_images(array, "x")


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"any": "object"}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"objects\.npy cannot be read as an \.npy or \.npz file"):
        load_arrays(tmp_path / "objects.npy")


@pytest.mark.parametrize("name", ["own.npy", "own.npz", "missing.npy"])
def test_damaged_and_missing_files_are_named(name: str, tmp_path: Path) -> None:
    if name == "own.npz":
        path = save(tmp_path / name, images=TRAIN)
        path.write_bytes(path.read_bytes()[:1000])
    elif name == "own.npy":
        (tmp_path / name).write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        load_arrays(tmp_path / name)


def test_an_npz_without_known_names_lists_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"own\.npz holds pictures, numbers; name the images by one of train_images"):
        load_arrays(save(tmp_path / "own.npz", pictures=TRAIN, numbers=np.arange(20)))


def test_labels_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels is int64 \(19,\); expected integers of shape \(20,\)"):
        load_arrays(save(tmp_path / "own.npz", images=TRAIN, labels=np.arange(19)))


def test_parts_of_different_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_images and test_images hold images of different shapes"):
        load_arrays(save(tmp_path / "own.npz", train_images=TRAIN, test_images=TEST[:, :24]))


def test_black_and_white_images_are_known_as_binarised(tmp_path: Path) -> None:
    black_and_white = np.where(TRAIN > 127, 255, 0).astype(np.uint8)
    assert load_arrays(save(tmp_path / "own.npz", images=black_and_white)).binarised


# Static binarisation

STATIC = {
    part: RNG.integers(0, 2, (rows, 784), dtype=np.uint8) for part, rows in (("train", 5), ("valid", 3), ("test", 8))
}


def as_text(bits: NDArray[np.uint8]) -> bytes:
    return "".join(" ".join(map(str, row)) + "\n" for row in bits).encode()


@pytest.fixture
def static_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both forms of a small static binarisation, whose digests stand in for the published ones."""
    for part, bits in STATIC.items():
        text = as_text(bits)
        (tmp_path / f"binarized_mnist_{part}.amat").write_bytes(text)
        monkeypatch.setitem(mnist.STATIC_PARTS, part, (len(bits), hashlib.sha256(text).hexdigest()))
    save(tmp_path / mnist.PACKED_NAME, **{part: np.packbits(bits, axis=1) for part, bits in STATIC.items()})
    return tmp_path


def load_static(path: Path) -> ImageData:
    return load(DataConfig(dataset="binarised-mnist", path=path))


@pytest.mark.parametrize("form", ["folder of texts", "folder with the packed file", "packed file"])
def test_each_form_of_the_static_binarisation(form: str, static_folder: Path) -> None:
    if form == "folder of texts":
        (static_folder / mnist.PACKED_NAME).unlink()
    data = load_static(static_folder / mnist.PACKED_NAME if form == "packed file" else static_folder)
    assert np.array_equal(data.train.reshape(5, 784), STATIC["train"] * 255)
    assert sorted(data.test.reshape(8, 784).tolist()) == sorted((STATIC["test"] * 255).tolist())
    assert data.validation is not None
    assert np.array_equal(data.validation.reshape(3, 784), STATIC["valid"] * 255)
    assert (data.train.shape, data.binarised) == ((5, 1, 28, 28), True)


def test_the_test_images_of_the_static_binarisation_are_mixed_in_one_order(static_folder: Path) -> None:
    """The published ones lie sorted by digit, so that their first 2 000 would be noughts and ones."""
    data = load_static(static_folder)
    assert not np.array_equal(data.test.reshape(8, 784), STATIC["test"] * 255)
    assert np.array_equal(data.test, load_static(static_folder).test)


def test_a_static_binarisation_with_one_other_bit_is_refused(static_folder: Path) -> None:
    changed = {part: bits.copy() for part, bits in STATIC.items()}
    changed["test"][1, 300] ^= 1
    save(static_folder / mnist.PACKED_NAME, **{part: np.packbits(bits, axis=1) for part, bits in changed.items()})
    with pytest.raises(DataError, match=r"packed\.npz: the images of test, .* have SHA-256 .*; the published file has"):
        load_static(static_folder)
    (static_folder / mnist.PACKED_NAME).unlink()
    (static_folder / "binarized_mnist_test.amat").write_bytes(as_text(changed["test"]))
    with pytest.raises(DataError, match=r"binarized_mnist_test\.amat: the images of test"):
        load_static(static_folder)


def test_a_truncated_text_is_refused(static_folder: Path) -> None:
    (static_folder / mnist.PACKED_NAME).unlink()
    (static_folder / "binarized_mnist_valid.amat").write_bytes(as_text(STATIC["valid"])[:-1])
    with pytest.raises(DataError, match=r"binarized_mnist_valid\.amat has 4703 bytes; the published file has 4704"):
        load_static(static_folder)


def test_a_packed_file_of_other_arrays_is_refused(static_folder: Path) -> None:
    save(static_folder / mnist.PACKED_NAME, train=TRAIN, valid=TEST, test=TEST)
    with pytest.raises(DataError, match=r"train is uint8 \(20, 28, 28\); expected uint8 \(5, 98\)"):
        load_static(static_folder)


def test_a_packed_file_with_a_part_missing_is_refused(static_folder: Path) -> None:
    save(static_folder / mnist.PACKED_NAME, train=TRAIN, test=TEST)
    with pytest.raises(DataError, match=r"has no array valid; the packed static binarisation has train, valid, test"):
        load_static(static_folder)


def test_a_folder_without_the_static_binarisation_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither binarized_mnist_packed\.npz nor all of binarized_mnist_train"):
        load_static(tmp_path)

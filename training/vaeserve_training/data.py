"""Every data set as the same thing: uint8 images (N, C, H, W), split into training and test.

What a model was trained on is part of what it is, so `ImageData` names its source and carries a digest over the
training images as used, after reading, resizing and splitting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaeserve_training import mnist, sources
from vaeserve_training.arrays import as_images, read_arrays
from vaeserve_training.config import DataConfig
from vaeserve_training.image_folder import FolderImages, read_folder
from vaeserve_training.sources import DataError

# Names under which people keep arrays in an .npz file.
_TRAIN_NAMES = ("train_images", "x_train", "train")
_TEST_NAMES = ("test_images", "x_test", "test")
_ALL_NAMES = ("images", "x", "arr_0")
_LABEL_NAMES = {
    "train_images": "train_labels", "x_train": "y_train", "train": "train_labels",
    "test_images": "test_labels", "x_test": "y_test", "test": "test_labels",
    "images": "labels", "x": "y", "arr_0": "labels",
}  # fmt: skip


@dataclass(frozen=True)
class ImageData:
    """A data set in memory."""

    name: str
    train: NDArray[np.uint8]  # (N, C, H, W)
    test: NDArray[np.uint8]  # (M, C, H, W)
    train_labels: NDArray[np.integer] | None
    test_labels: NDArray[np.integer] | None
    binarised: bool  # every pixel is 0 or 255
    sha256: str  # lower-case hex, over the bytes of `train`
    validation: NDArray[np.uint8] | None = None  # (K, C, H, W), where the data set has such a part
    origins: tuple[str, ...] = ()  # where the data were found, in words
    skipped: tuple[str, ...] = ()  # "path: reason" of every image that was left out


def load(config: DataConfig) -> ImageData:
    """Return the data set that `config` describes.

    Raises DataError, naming what is wrong and what to do, if it cannot be found, read or brought to
    `config.image_shape`.
    """
    loaders = {"folder": _load_folder, "arrays": _load_arrays, "binarised-mnist": _load_static}
    data = loaders.get(config.dataset, _load_canonical)(config)
    shape = data.train.shape[1:]
    if shape != config.image_shape:
        raise DataError(
            f"the images of {data.name} have shape {list(shape)}; data.image_shape is {list(config.image_shape)}: "
            "set it to the images' shape"
        )
    if config.limit_train is not None or config.limit_test is not None:
        data = _limited(data, config.limit_train, config.limit_test)
    return data


def summary(data: ImageData) -> dict[str, object]:
    """Return what there is to say about a data set, as JSON-ready values."""
    labels = [part for part in (data.train_labels, data.test_labels) if part is not None and len(part)]
    return {
        "name": data.name,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "validation_images": 0 if data.validation is None else len(data.validation),
        "image_shape": list(data.train.shape[1:]),
        "classes": len(np.unique(np.concatenate(labels))) if labels else 0,
        "binarised": data.binarised,
        "mean": round(float(data.train.mean()) / 255, 6),
        "sha256": data.sha256,
        "origins": list(data.origins),
        "skipped": list(data.skipped),
    }


def _load_canonical(config: DataConfig) -> ImageData:
    fetched = sources.fetch(mnist.FILE_SETS[config.dataset], folder=config.path, cache_dir=config.cache_dir)
    arrays = {name: mnist.read_idx(content) for name, content in fetched.contents.items()}
    return _image_data(
        config.dataset,
        train=arrays[mnist.TRAIN_IMAGES][:, None],
        test=arrays[mnist.TEST_IMAGES][:, None],
        train_labels=arrays[mnist.TRAIN_LABELS],
        test_labels=arrays[mnist.TEST_LABELS],
        origins=tuple(fetched.origins[name] for name in sorted(fetched.origins)),
    )


def _load_static(config: DataConfig) -> ImageData:
    path = _required_path(config, "the folder that holds the static binarisation")
    parts = mnist.read_static(path)
    # The published test images lie sorted by digit: mixed, so that the first of them are like all.
    order = np.random.Philox(key=0).random_raw(len(parts["test"])).argsort()
    data = _image_data(config.dataset, train=parts["train"], test=parts["test"][order], origins=(str(path),))
    return replace(data, validation=parts["valid"])


def _load_folder(config: DataConfig) -> ImageData:
    """Read a folder; its subfolders `train` and `test`, if it has both, are the split, else the images are split."""
    root = _required_path(config, "the folder that holds the images")
    if (root / "train").is_dir() and (root / "test").is_dir():
        parts = [read_folder(root / part, config.image_shape, config.on_bad_image) for part in ("train", "test")]
        labels = _labels(parts)
        data = _image_data(
            "folder", train=parts[0].images, test=parts[1].images, train_labels=labels[0], test_labels=labels[1]
        )
    else:
        parts = [read_folder(root, config.image_shape, config.on_bad_image)]
        data = _split("folder", parts[0].images, _labels(parts)[0], config)
    skipped = tuple(problem for part in parts for problem in part.skipped)
    return replace(data, origins=(str(root),), skipped=skipped)


def _labels(parts: list[FolderImages]) -> list[NDArray[np.integer] | None]:
    """Return the number of each image's class; None where some image lies in no class's folder."""
    names = sorted({name for part in parts for name in part.classes if name is not None})
    if any(name is None for part in parts for name in part.classes):
        return [None] * len(parts)
    numbers = {name: number for number, name in enumerate(names)}
    return [np.array([numbers[name] for name in part.classes if name is not None]) for part in parts]


def _load_arrays(config: DataConfig) -> ImageData:
    path = _required_path(config, "the .npy or .npz file")
    arrays = read_arrays(path)
    pairs = [(train, test) for train in _TRAIN_NAMES for test in _TEST_NAMES if train in arrays and test in arrays]
    if pairs:
        (train, train_labels), (test, test_labels) = (_images_and_labels(arrays, name, path) for name in pairs[0])
        if train.shape[1:] != test.shape[1:]:
            raise DataError(f"{path}: {pairs[0][0]} and {pairs[0][1]} hold images of different shapes")
        data = _image_data("arrays", train=train, test=test, train_labels=train_labels, test_labels=test_labels)
    else:
        name = next((name for name in _ALL_NAMES if name in arrays), None)
        if name is None:
            known = ", ".join((*_TRAIN_NAMES, *_TEST_NAMES, *_ALL_NAMES))
            raise DataError(f"{path} holds {', '.join(arrays) or 'nothing'}; name the images by one of {known}")
        data = _split("arrays", *_images_and_labels(arrays, name, path), config)
    return replace(data, origins=(str(path),))


def _images_and_labels(
    arrays: Mapping[str, NDArray[np.generic]], name: str, path: Path
) -> tuple[NDArray[np.uint8], NDArray[np.integer] | None]:
    images = as_images(arrays[name], f"{path}: {name}")
    labels = arrays.get(_LABEL_NAMES[name])
    if labels is None:
        return images, None
    expected = (len(images),)
    if labels.shape != expected or not np.issubdtype(labels.dtype, np.integer):
        given = f"{_LABEL_NAMES[name]} is {labels.dtype} {labels.shape}"
        raise DataError(f"{path}: {given}; expected integers of shape {expected}")
    return images, labels.astype(np.int64)


def _split(name: str, images: NDArray[np.uint8], labels: NDArray[np.integer] | None, config: DataConfig) -> ImageData:
    """Hold out `test_fraction` of the images: those with the smallest SHA-256 over seed and pixels.

    So an image is on the same side under any name, in any order and on any machine; copies of one image stay together
    (but for the last held out); and most images keep their side when others are added.
    """
    test_images = round(len(images) * config.test_fraction)
    if not 0 < test_images < len(images):
        raise DataError(
            f"{len(images)} images with test_fraction {config.test_fraction:g} leave {test_images} for the test; "
            "training and test both need one at least"
        )
    seed = str(config.seed).encode()
    ranks = sorted(range(len(images)), key=lambda row: hashlib.sha256(seed + b"\n" + images[row].tobytes()).digest())
    held_out = np.zeros(len(images), dtype=bool)
    held_out[ranks[:test_images]] = True
    return _image_data(
        name,
        train=images[~held_out],
        test=images[held_out],
        train_labels=None if labels is None else labels[~held_out],
        test_labels=None if labels is None else labels[held_out],
    )


def _image_data(
    name: str,
    *,
    train: NDArray[np.uint8],
    test: NDArray[np.uint8],
    train_labels: NDArray[np.integer] | None = None,
    test_labels: NDArray[np.integer] | None = None,
    origins: tuple[str, ...] = (),
) -> ImageData:
    train = np.ascontiguousarray(train)
    return ImageData(
        name=name,
        train=train,
        test=np.ascontiguousarray(test),
        train_labels=train_labels,
        test_labels=test_labels,
        binarised=all(bool(((part == 0) | (part == 255)).all()) for part in (train, test)),
        sha256=hashlib.sha256(train.data).hexdigest(),
        origins=origins,
    )


def _limited(data: ImageData, train: int | None, test: int | None) -> ImageData:
    """Return the data set with only its first `train` and `test` images; the digest is that of what remains."""
    limited = _image_data(
        data.name,
        train=data.train[:train],
        test=data.test[:test],
        train_labels=None if data.train_labels is None else data.train_labels[:train],
        test_labels=None if data.test_labels is None else data.test_labels[:test],
        origins=data.origins,
    )
    return replace(limited, validation=data.validation, skipped=data.skipped)


def _required_path(config: DataConfig, what: str) -> Path:
    if config.path is None:
        raise DataError(f"data set {config.dataset} needs data.path: {what}")
    return config.path

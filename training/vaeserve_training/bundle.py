"""Write a bundle: the graphs and the card with which a model leaves training.

A server trusts a bundle by its digests, and an operator by its version. So the digest depends on nothing but what the
graphs compute, a version appears whole or not at all, and it never changes once it is there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from vaeserve.v1 import vae_pb2
from vaeserve_training import atomic

ENCODER_FILE = "encoder.onnx"
DECODER_FILE = "decoder.onnx"
PRIOR_FILE = "prior.onnx"
ENCODER_FLOAT16_FILE = "encoder.fp16.onnx"
DECODER_FLOAT16_FILE = "decoder.fp16.onnx"
CARD_FILE = "model.json"
DIGEST_KEY = "vaeserve.digest"  # in the metadata of each graph
SCHEMA_VERSION = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[1-9][0-9]*")
_PUBLISH_ATTEMPTS = 5


class BundleError(Exception):
    """A bundle that cannot be published, of which nothing was left behind, or read. The message says why."""


def check_name(name: str) -> None:
    """Raise BundleError unless `name` is one that a model can be served under."""
    if not _NAME.fullmatch(name):
        raise BundleError(
            f"model name {name!r}: use letters, digits, '.', '_' and '-', starting with a letter or a digit"
        )


def check_version_is_free(models_dir: Path, name: str, version: int) -> None:
    """Raise BundleError if `version` is no positive integer or is published already."""
    if version < 1:
        raise BundleError(f"version {version}: use a positive integer, or none for the next free one")
    if (models_dir / name / str(version)).exists():
        raise BundleError(
            f"{models_dir / name / str(version)} exists, and a published version is never changed; give another "
            f"version, or none for the next free one ({next_version(models_dir, name)})"
        )


def next_version(models_dir: Path, name: str) -> int:
    """Return one more than the highest version of the model, 1 if it has none."""
    folder = models_dir / name
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return 1 + max((int(version) for version in names if _VERSION.fullmatch(version)), default=0)


def digest(
    weights: Mapping[str, NDArray[np.generic]], architecture: Mapping[str, object], settings: Mapping[str, object]
) -> str:
    """Return the bundle id, lower-case hex SHA-256: the same for the same graphs, whenever and wherever made.

    Hashed are, in this order: the line "vaeserve bundle 1"; architecture and export settings as one line of canonical
    JSON (sorted keys, no spaces); and for each weight, by name, one line of canonical JSON with its name, dtype and
    shape, followed by its elements, little-endian and row-major.
    """
    hasher = hashlib.sha256(b"vaeserve bundle 1\n")
    hasher.update(_canonical_line({"architecture": architecture, "settings": settings}))
    for name in sorted(weights):
        array = weights[name]
        little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        header = {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}
        hasher.update(_canonical_line(header))
        hasher.update(little_endian.tobytes())
    return hasher.hexdigest()


def publish(
    models_dir: Path, card: vae_pb2.ModelCard, graphs: Mapping[str, bytes], *, version: int | None = None
) -> Path:
    """Publish `models_dir`/`card.name`/`version`, by default the next free one, and return that folder.

    `graphs` are the contents of the files that the card names. Sets the card's version and the graphs' SHA-256.
    Raises BundleError if the version exists or the disk refuses; then nothing was published.
    """
    check_name(card.name)
    for graph in (*card.graphs, *card.float16_graphs):
        graph.sha256 = hashlib.sha256(graphs[graph.file]).hexdigest()
    if version is not None:
        check_version_is_free(models_dir, card.name, version)
        return _publish_version(models_dir, card, graphs, version)
    for _ in range(_PUBLISH_ATTEMPTS):  # another exporter may take the number first
        try:
            return _publish_version(models_dir, card, graphs, next_version(models_dir, card.name))
        except FileExistsError:
            continue
    raise BundleError(f"{models_dir / card.name}: others took {_PUBLISH_ATTEMPTS} versions in a row; try again")


def _publish_version(models_dir: Path, card: vae_pb2.ModelCard, graphs: Mapping[str, bytes], version: int) -> Path:
    path = models_dir / card.name / str(version)
    card.version = str(version)
    try:
        atomic.publish_folder(path, {**graphs, CARD_FILE: card_json(card)})
    except FileExistsError:
        raise
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error.strerror}; nothing was published") from error
    return path


def card_json(card: vae_pb2.ModelCard) -> bytes:
    """Return the card as model.json holds it: protobuf JSON with the names of vae.proto, defaults printed."""
    text = json_format.MessageToJson(
        card, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=2
    )
    return text.encode() + b"\n"


def resolve(path: Path) -> Path:
    """Return `path` if it is a bundle, its highest version if it is a model's folder; BundleError otherwise."""
    if (path / CARD_FILE).is_file():
        return path
    versions = [int(folder.name) for folder in path.glob("*/") if _VERSION.fullmatch(folder.name)]
    newest = path / str(max(versions, default=0))
    if not (newest / CARD_FILE).is_file():
        raise BundleError(f"{path} is no bundle ({CARD_FILE} is missing) and no model's folder with one")
    return newest


def read_card(folder: Path) -> vae_pb2.ModelCard:
    """Return the card of a published bundle; BundleError if it is missing, damaged or of another schema."""
    path = folder / CARD_FILE
    try:
        card = json_format.Parse(path.read_bytes(), vae_pb2.ModelCard(), ignore_unknown_fields=True)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is damaged or no model card: {error}") from error
    if card.schema_version != SCHEMA_VERSION:
        raise BundleError(f"{path} has schema version {card.schema_version}; this release reads {SCHEMA_VERSION}")
    return card


def _canonical_line(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"

"""Reading a bundle, models/<name>/<version>/, and believing nothing in it that is not checked.

A bundle is where training and serving meet: `model.json` (a ModelCard) names the graphs and their SHA-256, and the
graphs carry the card's digest, so a damaged, swapped or mixed file is found before it answers anybody. Only the card
and the files that it names are opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from google.protobuf import json_format

from vaeserve.v1 import vae_pb2
from vaeserve_server import graph_scan
from vaeserve_server.errors import BundleError, shown

CARD_FILE = "model.json"
SCHEMA_VERSION = 1
DIGEST_KEY = "vaeserve.digest"

ENCODER = vae_pb2.GRAPH_ROLE_ENCODER
DECODER = vae_pb2.GRAPH_ROLE_DECODER
PRIOR = vae_pb2.GRAPH_ROLE_PRIOR

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
VERSION_PATTERN = re.compile(r"[1-9][0-9]{0,17}")
_FILE_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.onnx")
_SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
_MAX_CARD_BYTES = 4 * 2**20  # a few numbers for each latent, and the training configuration
# Non-blocking: to open a pipe would wait for ever for somebody who writes to it. Windows has none but the last.
_OPEN_FLAGS = os.O_RDONLY
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    _OPEN_FLAGS |= getattr(os, _flag, 0)
_MAX_GRAPH_BYTES = 2**31 - 1  # protobuf's own limit


Precision = Literal["fp32", "fp16"]


class Port(NamedTuple):
    """One input or output of a graph. An axis whose length is free is None; `type` is in ONNX Runtime's words."""

    name: str
    type: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class GraphFile:
    """One graph of a bundle: its file and the verified bytes."""

    path: Path
    data: bytes


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: the card, and the graphs by role (ENCODER and DECODER, and PRIOR where there is one).

    `float16_graphs` are ENCODER and DECODER in float16, or empty.
    """

    card: vae_pb2.ModelCard
    graphs: Mapping[int, GraphFile]
    float16_graphs: Mapping[int, GraphFile]

    def in_precision(self, precision: Precision) -> Bundle:
        """Return the bundle with the graphs to run, the prior's as it is; BundleError if it has none in `precision`."""
        if precision == "fp32":
            return self
        if not self.float16_graphs:
            raise BundleError(
                self.graphs[ENCODER].path.with_name(CARD_FILE),
                "it names no graphs in fp16; export the model again with `vaeserve-train export --precision fp16`, or "
                "serve it with --precision fp32",
            )
        return replace(self, graphs={**self.graphs, **self.float16_graphs})


def read_bundle(models_dir: Path, name: str, version: str) -> Bundle:
    """Return the bundle of models_dir/name/version with every file's SHA-256 checked; BundleError naming the file."""
    folder = models_dir / name / version
    if not folder.resolve().is_relative_to(models_dir.resolve()):
        raise BundleError(folder, f"it is a link that leads out of {models_dir}")
    card = _read_card(folder)
    for field, given, expected in (("name", card.name, name), ("version", card.version, version)):
        if given != expected:
            raise BundleError(
                folder / CARD_FILE,
                f"{field} is {shown(given)} but the folder says {expected!r}; publish the model under its own name",
            )
    return Bundle(card, _read_graphs(folder, card.graphs), _read_graphs(folder, card.float16_graphs))


def check_ports(bundle: Bundle, role: int, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Raise BundleError unless the graph takes and gives exactly what the card says."""
    image = ("tensor(float)", (None, *bundle.card.image_shape))
    latent = ("tensor(float)", (None, *bundle.card.latent_shape))
    expected: dict[int, tuple[list[Port], list[Port]]] = {
        ENCODER: ([Port("image", *image)], [Port("mean", *latent), Port("stddev", *latent)]),
        DECODER: ([Port("latent", *latent)], [Port("image", *image)]),
        PRIOR: ([Port("noise", *latent)], [Port("latent", *latent)]),
    }
    for side, given, wanted in zip(("takes", "gives"), (inputs, outputs), expected[role], strict=True):
        if list(given) != wanted:
            raise BundleError(
                bundle.graphs[role].path,
                f"the graph {side} {_ports(given)} but {CARD_FILE} says {_ports(wanted)}; export the model again",
            )


def check_digest(bundle: Bundle, role: int, metadata: Mapping[str, str]) -> None:
    """Raise BundleError unless the graph carries the card's digest, as one of another model does not."""
    digest = metadata.get(DIGEST_KEY)
    if digest != bundle.card.digest:
        given = "no digest" if digest is None else f"digest {shown(digest)}"
        raise BundleError(
            bundle.graphs[role].path,
            f"the graph carries {given} but {CARD_FILE} has {bundle.card.digest!r}: files of different models are "
            "mixed; export the model again",
        )


def _read_card(folder: Path) -> vae_pb2.ModelCard:
    file = folder / CARD_FILE
    data = _read(folder, CARD_FILE, _MAX_CARD_BYTES)
    try:
        card = json_format.Parse(data, vae_pb2.ModelCard(), ignore_unknown_fields=True)
    except (json_format.ParseError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(file, f"it is not a model card ({' '.join(str(error).split())[:200]})") from None
    for problem in _card_problems(card):
        raise BundleError(file, problem)
    return card


def _card_problems(card: vae_pb2.ModelCard) -> Iterator[str]:
    if card.schema_version != SCHEMA_VERSION:
        yield f"schema_version is {card.schema_version}; this server reads {SCHEMA_VERSION}"
    if not _SHA256_PATTERN.fullmatch(card.digest):
        yield f"digest is {shown(card.digest)}; it must be 64 lower-case hex digits"
    if len(card.image_shape) != 3 or min(card.image_shape) < 1:
        yield f"image_shape is {tuple(card.image_shape)}; it must be [C, H, W], each at least 1"
    if len(card.latent_shape) not in {1, 3} or min(card.latent_shape) < 1:
        yield f"latent_shape is {tuple(card.latent_shape)}; it must be [D] or [C, h, w], each at least 1"
    if _roles(card.graphs) not in ([ENCODER, DECODER], [ENCODER, DECODER, PRIOR]):
        yield f"graphs are {_role_names(card.graphs)}; they must be one encoder, one decoder and at most one prior"
    if _roles(card.float16_graphs) not in ([], [ENCODER, DECODER]):
        names = _role_names(card.float16_graphs)
        yield f"float16_graphs are {names}; they must be one encoder and one decoder, or none"
    for graph in (*card.graphs, *card.float16_graphs):
        if not _FILE_PATTERN.fullmatch(graph.file):
            yield f"graph file {shown(graph.file)} is no plain name that ends in .onnx"
        if not _SHA256_PATTERN.fullmatch(graph.sha256):
            yield f"sha256 of {graph.file} is {shown(graph.sha256)}; it must be 64 lower-case hex digits"


def _roles(graphs: Iterable[vae_pb2.Graph]) -> list[int]:
    return sorted(graph.role for graph in graphs)


def _role_names(graphs: Iterable[vae_pb2.Graph]) -> list[str]:
    known = vae_pb2.GraphRole.values()
    return [vae_pb2.GraphRole.Name(role) if role in known else str(role) for role in _roles(graphs)]


def _read_graphs(folder: Path, graphs: Iterable[vae_pb2.Graph]) -> dict[int, GraphFile]:
    return {graph.role: _read_graph(folder, graph) for graph in graphs}


def _read_graph(folder: Path, graph: vae_pb2.Graph) -> GraphFile:
    path = folder / graph.file
    data = _read(folder, graph.file, _MAX_GRAPH_BYTES)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != graph.sha256:
        raise BundleError(
            path,
            f"its SHA-256 is {sha256} ({len(data)} bytes) but {CARD_FILE} says {graph.sha256}: the file is damaged or "
            "changed; publish the model again",
        )
    try:
        problem = graph_scan.problem(data)
    except ValueError as error:
        raise BundleError(path, f"it is no ONNX graph: {error}") from None
    if problem is not None:
        raise BundleError(path, problem)
    return GraphFile(path, data)


def _read(folder: Path, name: str, limit_bytes: int) -> bytes:
    """Return the bytes of a plain file that really lies in `folder`; opened once, so what is judged is what is read."""
    path = folder / name
    try:
        target = path.resolve(strict=True)  # links inside the bundle are how configuration volumes are mounted
        if not target.is_relative_to(folder.resolve()):
            raise BundleError(path, "it is a link that leads out of its folder")
        with os.fdopen(_open_plain(target, path), "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(limit_bytes + 1) if status.st_size <= limit_bytes else None
    except FileNotFoundError:
        raise BundleError(path, "it is missing; publish the model again") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        raise BundleError(path, f"it cannot be read ({error})") from None
    if data is None or len(data) > limit_bytes:
        raise BundleError(path, f"it has {status.st_size} bytes; at most {limit_bytes} are read")
    return data


def _open_plain(target: Path, path: Path) -> int:
    descriptor = os.open(target, _OPEN_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(path, "it is no plain file")
    return descriptor


def _ports(ports: Sequence[Port]) -> str:
    shapes = (
        f"{port.name} {port.type} [{', '.join('N' if axis is None else str(axis) for axis in port.shape)}]"
        for port in ports
    )
    return ", ".join(shapes) or "nothing"

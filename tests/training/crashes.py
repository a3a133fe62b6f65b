"""Publish a bundle, and write a file, again and again in processes that die at their n-th file operation.

    python crashes.py FOLDER

Each attempt n = 1, 2, ... is a fork that SIGKILL ends right before the n-th operation on a file, in a folder of its
own, FOLDER/<writer>-<n>, until one lives to the end. Prints by writer how many operations it takes. Imports nothing
heavy, so that there is one thread and a fork is safe.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from killer import Killer
from vaeserve.v1 import vae_pb2
from vaeserve_training import atomic, bundle

OLD, NEW = b"old", b"new" * 5000
GRAPHS = {"encoder.onnx": b"encoder" * 3000, "decoder.onnx": b"decoder" * 3000}
SURVIVED = 0


def card() -> vae_pb2.ModelCard:
    """Return a card of two graphs."""
    made = vae_pb2.ModelCard(schema_version=1, name="tiny", digest="d" * 64, image_shape=[1, 4, 4], latent_shape=[2])
    made.graphs.add(role=vae_pb2.GRAPH_ROLE_ENCODER, file="encoder.onnx")
    made.graphs.add(role=vae_pb2.GRAPH_ROLE_DECODER, file="decoder.onnx")
    return made


def publish(folder: Path) -> None:
    bundle.publish(folder, card(), GRAPHS)


def write(folder: Path) -> None:
    atomic.write_file(folder / "file", NEW)


def prepare(folder: Path) -> None:
    folder.mkdir()
    (folder / "file").write_bytes(OLD)


WRITERS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "publish": (Path.mkdir, publish),
    "write": (prepare, write),
}


def operations(writer: str, root: Path) -> int:
    """Let the writer die at each of its operations; return how many there are."""
    before, act = WRITERS[writer]
    number = 0
    while True:
        number += 1
        folder = root / f"{writer}-{number:03}"
        before(folder)
        child = os.fork()
        if child == 0:
            sys.setprofile(Killer(f"files:{number}"))
            act(folder)
            os._exit(SURVIVED)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == SURVIVED:
            return number - 1


if __name__ == "__main__":
    print(json.dumps({writer: operations(writer, Path(sys.argv[1])) for writer in WRITERS}))

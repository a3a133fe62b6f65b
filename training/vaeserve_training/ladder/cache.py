"""Trained networks on disk under a hash of all that they depend on, so that none is trained twice.

Steps of the ladder share systems, and a ladder that was cut off goes on where it was: what is finished is here. An
entry is published by one rename, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from vaeserve_training import atomic
from vaeserve_training.data import ImageData
from vaeserve_training.ladder.systems import Spec, build
from vaeserve_training.ladder.training import Advance, Record, Trained, train
from vaeserve_training.models import Decoder

KEY = "key.json"
RECORD = "record.json"
WEIGHTS = "weights.safetensors"
_KEY_DIGITS = 16


class CacheError(RuntimeError):
    """An entry that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Entry:
    """Tensors by name, and JSON-ready values beside them."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class Cache:
    """A folder of entries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: dict[str, Any]) -> Path:
        """Return the folder of the entry with that key."""
        return self.folder / hashlib.sha256(_canonical(key)).hexdigest()[:_KEY_DIGITS]

    def has(self, key: dict[str, Any]) -> bool:
        """Return whether there is an entry with that key."""
        return (self.path(key) / KEY).is_file()

    def get(self, key: dict[str, Any], make: Callable[[], Entry]) -> Entry:
        """Return the entry with that key, making and keeping it if there is none."""
        if self.has(key):
            return _read(self.path(key))
        entry = make()
        files = {
            KEY: _canonical(key),
            RECORD: json.dumps(entry.record).encode(),
            WEIGHTS: safetensors.torch.save({name: tensor.contiguous() for name, tensor in entry.tensors.items()}),
        }
        atomic.publish_folder(self.path(key), files)
        return entry


def system_key(spec: Spec, data: ImageData) -> dict[str, Any]:
    """Return what a trained system depends on. Where and how fast it is trained does not count."""
    key = spec.model_dump(mode="json")
    key["config"]["data"] = {"limit_train": spec.images, "sha256": data.sha256}
    for name in ("device", "threads", "keep_checkpoints", "monitor_images"):
        del key["config"]["run"][name]
    return {"system": key}


def trained_system(
    cache: Cache, spec: Spec, data: ImageData, *, device: str = "auto", advance: Advance | None = None
) -> Trained:
    """Return the spec's system, trained now unless the cache has it."""

    def make() -> Entry:
        trained = train(spec, data, device=device, advance=advance)
        states = {"": trained.system.state_dict()}
        states |= {f"{step}/": weights for step, weights in trained.snapshots.items()}
        tensors = {prefix + name: tensor for prefix, state in states.items() for name, tensor in state.items()}
        history = [asdict(record) for record in trained.history]
        record = {"spec": spec.model_dump(mode="json"), "steps": trained.steps, "seconds": trained.seconds}
        return Entry(tensors, record | {"history": history})

    entry = cache.get(system_key(spec, data), make)
    system = build(spec, data)
    system.load_state_dict({name: tensor for name, tensor in entry.tensors.items() if "/" not in name})
    snapshots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in entry.tensors.items():
        step, slash, rest = name.partition("/")
        if slash:
            snapshots.setdefault(int(step), {})[rest] = tensor
    return Trained(
        system=system.eval().requires_grad_(False),
        steps=entry.record["steps"],
        seconds=entry.record["seconds"],
        history=tuple(Record(**values) for values in entry.record["history"]),
        snapshots=snapshots,
    )


def load_decoder(path: Path) -> Decoder:
    """Return the decoder of the system in the cache's folder `path`, ready to decode codes."""
    entry = _read(path)
    config = Spec.model_validate(entry.record["spec"]).config
    decoder = Decoder(config.model, config.data.image_shape)
    prefix = "decoder."
    decoder.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in entry.tensors.items() if name.startswith(prefix)}
    )
    return decoder.eval().requires_grad_(False)


def _canonical(key: dict[str, Any]) -> bytes:
    return json.dumps(key, sort_keys=True).encode()


def _read(path: Path) -> Entry:
    try:
        return Entry(safetensors.torch.load((path / WEIGHTS).read_bytes()), json.loads((path / RECORD).read_bytes()))
    except (OSError, ValueError, SafetensorError) as error:
        raise CacheError(
            f"the cached network {path} cannot be read ({error}); remove that folder and run again"
        ) from error

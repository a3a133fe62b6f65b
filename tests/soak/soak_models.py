"""The models folder of a soak: new versions under load, damaged ones among them, and what each of them must answer."""

from __future__ import annotations

import functools
import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from bundles import DECODER, ENCODER, FILES, decoder, encoder, read_card, write_bundle, write_card
from vaeserve import ModelRef

SMALL = "small"
DIGITS = "digits"
PINNED = f"{SMALL}/1"
IMAGE, LATENT = (1, 12, 12), (5,)
_KEPT = 3
_CORRUPT_EVERY = 20
_DIGITS_EVERY = 10


class Publisher:
    """Publishes into `folder`, and keeps every version that it ever published in `archive`.

    `small` is made by hand, each version with weights of its own, so that an answer of another version shows. `digits`
    is a trained model, if there is one, which comes again under new version numbers.
    """

    def __init__(self, folder: Path, archive: Path, trained: Path | None) -> None:
        self.folder = folder
        self.archive = archive
        self.published = 0
        self._trained = trained
        self._versions = {SMALL: 0, DIGITS: 0}
        self._publish_small()
        if trained is not None:
            self._publish_digits()

    def next(self) -> None:
        """Publish another version, and remove what no client names any more."""
        self.published += 1
        for broken in self.folder.glob(f"{SMALL}/9????????"):
            shutil.rmtree(broken)
        if self.published % _CORRUPT_EVERY == 5:
            self._publish_corrupt()
        elif self._trained is not None and self.published % _DIGITS_EVERY == 3:
            self._publish_digits()
        else:
            self._publish_small()

    def _publish_small(self) -> None:
        version = self._next(SMALL)
        digest = hashlib.sha256(f"{SMALL}/{version}".encode()).hexdigest()
        write_bundle(
            self.archive,
            SMALL,
            str(version),
            image_shape=IMAGE,
            latent_shape=LATENT,
            digest=digest,
            graphs={
                ENCODER: encoder(IMAGE, LATENT, digest, salt=version),
                DECODER: decoder(IMAGE, LATENT, digest, salt=version),
            },
        )
        self._put(SMALL, version)

    def _publish_digits(self) -> None:
        assert self._trained is not None
        version = self._next(DIGITS)
        copy = self.archive / DIGITS / str(version)
        shutil.copytree(self._trained, copy)
        card = read_card(copy)
        card.name, card.version = DIGITS, str(version)
        write_card(copy, card)
        self._put(DIGITS, version)

    def _publish_corrupt(self) -> None:
        """Publish the last version again under a number that is far ahead, with a flipped bit."""
        broken = self.archive / SMALL / "broken"
        shutil.copytree(self.archive / SMALL / str(self._versions[SMALL]), broken)
        data = bytearray((broken / FILES[DECODER]).read_bytes())
        data[len(data) // 2] ^= 1
        (broken / FILES[DECODER]).write_bytes(data)
        broken.rename(self.folder / SMALL / f"9{self.published:08d}")

    def _next(self, name: str) -> int:
        self._versions[name] += 1
        return self._versions[name]

    def _put(self, name: str, version: int) -> None:
        """Publish by a rename, as an exporter does; keep the newest and the first."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        staged = self.folder / name / f".{version}"
        shutil.copytree(self.archive / name / str(version), staged)
        staged.rename(self.folder / name / str(version))
        old = version - _KEPT
        if old > 1:
            shutil.rmtree(self.folder / name / str(old), ignore_errors=True)


class Direct:
    """What ONNX Runtime answers for any version in the archive, with nothing of the server between."""

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        self._session = functools.lru_cache(maxsize=32)(self._open)

    def shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of an image and of a latent, which all versions share."""
        card = read_card(self._archive / name / "1")
        return tuple(card.image_shape), tuple(card.latent_shape)

    def encode(self, model: ModelRef, images: NDArray[Any]) -> list[NDArray[np.float32]]:
        """Return mean and stddev."""
        scaled = images.astype(np.float32) / np.float32(255) if images.dtype == np.uint8 else images
        return self._run(model.name, model.version, ENCODER, scaled)

    def decode(self, name: str, version: str, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return images."""
        return self._run(name, version, DECODER, latents)[0]

    def _run(self, name: str, version: str, role: int, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        session = self._session(name, version, role)
        outputs: list[NDArray[np.float32]] = session.run(None, {session.get_inputs()[0].name: batch})
        return outputs

    def _open(self, name: str, version: str, role: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = self._archive / name / version / FILES[role]
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

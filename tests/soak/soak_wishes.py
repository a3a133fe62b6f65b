"""What the clients of a soak ask for, at random, and how each answer is judged: against direct runs, row by row."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from soak_models import PINNED, SMALL, Direct
from vaeserve import ModelRef
from vaeserve_server.noise import standard_normal

_MOST_ROWS = 48
_TOLERANCE = {"rtol": 1e-4, "atol": 3e-5}


class Wish(NamedTuple):
    """One call of a client's verb, and what its answer is held against; AssertionError if it is wrong."""

    verb: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    check: Callable[[Any], None]


@dataclass
class Books:
    """How the calls of one verb ended. Each that was issued must end as one of the others, `failed` as none."""

    issued: int = 0
    answered: int = 0
    cancelled: int = 0
    expired: int = 0
    refused: int = 0
    failed: int = 0
    wrong: int = 0

    def balance(self) -> int:
        """Return how many calls were lost sight of."""
        ended = self.answered + self.cancelled + self.expired + self.refused + self.failed + self.wrong
        return self.issued - ended


@dataclass
class Ledger:
    """The books of one client process, and what went wrong in words."""

    books: dict[str, Books] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def open(self, verb: str) -> Books:
        """Issue a call."""
        books = self.books.setdefault(verb, Books())
        books.issued += 1
        return books

    def complain(self, words: str) -> None:
        """Keep the first problems."""
        if len(self.problems) < 20:
            self.problems.append(words[:500])

    def as_json(self) -> dict[str, Any]:
        """Return it for the soak's process."""
        return {"books": {verb: asdict(books) for verb, books in self.books.items()}, "problems": self.problems}


class Wishes:
    """An endless supply, the same for the same seed."""

    def __init__(self, direct: Direct, names: list[str], seed: int) -> None:
        self._direct = direct
        self._shapes = {name: direct.shapes(name) for name in names}
        self.random = random.Random(seed)
        self._rng = np.random.default_rng(seed)

    def next(self) -> Wish:
        """Return another one."""
        return self.random.choice((self._encode, self._encode, self._decode, self._sample))()

    def _encode(self) -> Wish:
        name = self.random.choice(list(self._shapes))
        shape = (self._rows(), *self._shapes[name][0])
        if self.random.random() < 0.5:
            images: Any = self._rng.integers(0, 256, shape, np.uint8)
        else:
            images = self._rng.random(shape, np.float32)
        options: dict[str, Any] = {"model": self.random.choice((name, PINNED)) if name == SMALL else name}
        if self.random.random() < 0.5:
            options |= {"want_latents": True, "seed": self.random.randrange(2**64), "first_row": 7}

        def check(answer: Any) -> None:
            mean, stddev = self._direct.encode(answer.model, images)
            np.testing.assert_allclose(answer.mean, mean, **_TOLERANCE)
            np.testing.assert_allclose(answer.stddev, stddev, **_TOLERANCE)
            if "seed" in options:
                noise = standard_normal(options["seed"], 7, len(mean), mean[0].size).reshape(mean.shape)
                np.testing.assert_allclose(answer.latents, mean + stddev * noise, rtol=1e-3, atol=1e-3)

        return Wish("encode", (images,), options, check)

    def _decode(self) -> Wish:
        # An answer of this verb does not say who gave it, so the version is named.
        name, version = PINNED.split("/")
        latents = self._rng.standard_normal((self._rows(), *self._shapes[name][1]), np.float32)
        dtype = self.random.choice((np.float32, np.uint8))

        def check(answer: Any) -> None:
            images = self._direct.decode(name, version, latents)
            if dtype is np.uint8:
                assert np.abs(answer.astype(np.float32) - images * 255).max() <= 0.51
            else:
                np.testing.assert_allclose(answer, images, **_TOLERANCE)

        return Wish("decode", (latents,), {"model": PINNED, "dtype": dtype}, check)

    def _sample(self) -> Wish:
        name = self.random.choice(list(self._shapes))
        rows, seed = self._rows(), self.random.randrange(2**64)
        latent_shape = self._shapes[name][1]

        def check(answer: Any) -> None:
            noise = standard_normal(seed, 0, rows, int(np.prod(latent_shape))).reshape(rows, *latent_shape)
            np.testing.assert_allclose(answer.latents, noise, rtol=1e-6)
            images = self._direct.decode(answer.model.name, answer.model.version, answer.latents)
            np.testing.assert_allclose(answer.images, images, **_TOLERANCE)

        return Wish("sample", (rows,), {"model": name, "seed": seed}, check)

    def bad(self) -> Wish:
        """Return one that must be refused by the server."""
        wrong = self.random.choice(("nobody", f"{SMALL}/77777", ModelRef(SMALL, "1", "0" * 64)))
        return Wish("sample", (1,), {"model": wrong}, lambda answer: None)

    def _rows(self) -> int:
        return self.random.choice((1, 1, 2, self.random.randint(1, _MOST_ROWS)))

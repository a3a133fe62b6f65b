"""Sizes in words: no figure or picture is shown without those it was made with."""

from __future__ import annotations

from collections.abc import Sequence

from vaeserve_training.ladder.systems import Spec
from vaeserve_training.ladder.training import total_steps


def number(count: int) -> str:
    """Return 10000 as `10 000`."""
    return f"{count:,}".replace(",", " ")


def listed(values: Sequence[object]) -> str:
    """Return `a, b and c`."""
    *first, last = [number(value) if isinstance(value, int) else str(value) for value in values]
    return f"{', '.join(first)} and {last}" if first else last


def sizes(spec: Spec, seeds: Sequence[int], *extra: str, images: str = "") -> str:
    """Return what a system was made with; `images` and `extra` say what differs between several."""
    model, optimiser = spec.config.model, spec.config.optimiser
    channels = "-".join(str(width) for width in reversed(model.channels))
    hidden = "-".join(str(width) for width in reversed(model.hidden))
    network = f"{hidden} hidden units" + (f", then deconvolutions {channels}" if channels else ", fully connected")
    how_many = images or f"{number(spec.images)} training image{'s' * (spec.images > 1)}"
    at_most = "at most " if spec.worst_mse is not None else ""
    length = f"{at_most}{number(total_steps(spec))} steps of {min(optimiser.batch_size, spec.images)}"
    seeds_in_words = f"seed{'s' * (len(seeds) > 1)} {listed(seeds)}"
    return "; ".join([how_many, network, length, seeds_in_words, *extra])

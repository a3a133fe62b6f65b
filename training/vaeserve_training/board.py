"""TensorBoard's event files of a run, beside `metrics.jsonl` and from it: the same curves, and what the model makes.

Needs the extra `tensorboard`; nothing else imports it unless it is asked for. What is in an event file stays in it, so
a process that goes on with a run begins a new one, which declares void whatever the old ones hold of steps that the run
no longer knows, and adds what they lack: readers see every step once, however often the run was cut off.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vaeserve_training import metrics
from vaeserve_training.config import LikelihoodName
from vaeserve_training.evaluate import reconstruct
from vaeserve_training.models import Vae
from vaeserve_training.randomness import Stream, generator

FOLDER = "tensorboard"
PICTURES = 20
"""How often in a run pictures are drawn, about."""
RECONSTRUCTIONS = "reconstructions"
SAMPLES = "samples"
_COLUMNS = 8  # TensorBoard's grid
_LOSS = "train/loss"


class BoardError(RuntimeError):
    """Event files that cannot be written. The message says why and what to do."""


def require() -> None:
    """Raise BoardError unless TensorBoard is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise BoardError('TensorBoard is not installed: pip install "vaeserve[training,tensorboard]"')


class Board:
    """The event files of one run, in its folder `tensorboard`."""

    def __init__(self, run_dir: Path) -> None:
        """Begin with what the run's `metrics.jsonl` holds. BoardError where TensorBoard is not installed."""
        require()
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra, and seconds to import

        folder, records = run_dir / FOLDER, metrics.read(run_dir / metrics.FILE)
        written = _last_step(folder, records)
        self._writer = SummaryWriter(str(folder), purge_step=written + 1)
        for record in records:
            if record["step"] > written:
                self.add(record)

    def add(self, record: metrics.Record) -> None:
        """Add an epoch's figures at its last step, and flush them to the file."""
        for name, value in record.items():
            if name not in {"epoch", "step"}:
                self._writer.add_scalar(_tag(name), value, record["step"])
        self._writer.add_scalar("epoch", record["epoch"], record["step"])
        self._writer.flush()

    def show(self, name: str, images: NDArray[np.floating], step: int) -> None:
        """Add images, (N, C, H, W) in 0..1, C = 1 or 3, as one picture, 8 in a row."""
        self._writer.add_images(name, np.rint(images * 255).astype(np.uint8), step)

    def draw(self, vae: Vae, pixels: NDArray[np.uint8], likelihood: LikelihoodName, seed: int, step: int) -> None:
        """Show the first 8 of `pixels`, (N, C, H, W), over their reconstructions, and 64 draws from N(0, I), decoded.

        The draws come from the same latents each time, so that one sees them change. Images of other than 1 or 3
        channels are no pictures; nothing is shown of them.
        """
        if pixels.shape[1] not in (1, 3):
            return
        self.show(RECONSTRUCTIONS, np.concatenate(reconstruct(vae, pixels[:_COLUMNS], likelihood)), step)
        device = next(vae.parameters()).device
        latents = torch.randn((_COLUMNS**2, vae.latent_size), generator=generator(seed, Stream.PICTURES))
        with torch.no_grad():
            self.show(SAMPLES, vae.decoder(latents.to(device)).float().cpu().numpy(), step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _last_step(folder: Path, records: Sequence[metrics.Record]) -> int:
    """Return the step of the last of `records` that is in the folder's event files, 0 if none is."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator  # noqa: PLC0415

    if not folder.is_dir():
        return 0
    everything = 0  # in TensorBoard's words; of other kinds it keeps little
    events = EventAccumulator(str(folder), size_guidance={SCALARS: everything}, purge_orphaned_data=False)
    events.Reload()
    known = _LOSS in events.Tags()[SCALARS]
    losses = {event.step: event.value for event in events.Scalars(_LOSS)} if known else {}
    same = (record["step"] for record in records if losses.get(record["step"]) == np.float32(record["loss"]))
    return int(max(same, default=0))


def _tag(name: str) -> str:
    """`test_rate_nats` -> `test/rate_nats`, anything else under `train`: TensorBoard groups by what is before the /."""
    return f"test/{name.removeprefix('test_')}" if name.startswith("test_") else f"train/{name}"

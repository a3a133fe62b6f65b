"""Checkpoints: one folder each, published by one rename, so that a kill at any moment leaves a whole one to go on from.

A run's folder holds `checkpoints/epoch-0003/` (three epochs done) or `checkpoints/epoch-0003-step-000120/` (interrupted
120 steps later), each with `config.json`, `progress.json`, `weights.safetensors`, `ema.safetensors` where a moving
average is kept, and `optimiser.pt`. No pickle is ever loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vaeserve_training import atomic
from vaeserve_training.config import TrainConfig
from vaeserve_training.models import Vae, build

FOLDER = "checkpoints"
CONFIG = "config.json"
PROGRESS = "progress.json"
WEIGHTS = "weights.safetensors"
EMA = "ema.safetensors"
OPTIMISER = "optimiser.pt"
_NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?")
_RETIRED_SUFFIX = ".retired.tmp"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or not of this run. The message names the path and what to do."""


@dataclass(frozen=True)
class DatasetInfo:
    """What the run was trained on. `sha256` is over the training images as used; `binarised`: they are 0 or 255."""

    name: str
    sha256: str
    train_images: int
    test_images: int
    binarised: bool


@dataclass(frozen=True)
class Progress:
    """How far a run is. `epoch` counts whole epochs; `totals` are the sums over the steps of an unfinished one."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    totals: tuple[float, ...] = ()


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself; `environment` is what bit-identical resuming needs to be the same."""

    path: Path
    config: TrainConfig
    progress: Progress
    dataset: DatasetInfo
    environment: dict[str, str]


@dataclass(frozen=True)
class Checkpoint(Header):
    """A model as it is evaluated and exported: on the CPU, in evaluation mode, with the averaged weights if any.

    `weights_sha256` is over the file the weights came from.
    """

    vae: Vae
    weights_sha256: str


def save(
    run_dir: Path,
    *,
    config: TrainConfig,
    dataset: DatasetInfo,
    progress: Progress,
    vae: Vae,
    ema: Vae | None,
    optimiser: torch.optim.Optimizer,
    environment: dict[str, str],
) -> Path:
    """Publish a checkpoint of the run and return its folder; older ones beyond `run.keep_checkpoints` are removed."""
    name = f"epoch-{progress.epoch:04d}"
    if progress.step_in_epoch:
        name += f"-step-{progress.step_in_epoch:06d}"
    path = run_dir / FOLDER / name
    record = {"progress": asdict(progress), "dataset": asdict(dataset), "environment": environment}
    files = {
        CONFIG: config.to_json().encode(),
        PROGRESS: json.dumps(record, indent=2).encode(),
        WEIGHTS: _weights(vae),
        OPTIMISER: _optimiser_state(optimiser),
    }
    if ema is not None:
        files[EMA] = _weights(ema)
    atomic.publish_folder(path, files)
    for old in all_of(run_dir)[: -config.run.keep_checkpoints]:
        _remove(old)
    return path


def all_of(run_dir: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    folder = run_dir / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_position)


def latest(run_dir: Path) -> Path | None:
    """Return the run's newest checkpoint, None if it has none."""
    return next(reversed(all_of(run_dir)), None)


def latest_position(run_dir: Path) -> tuple[int, int]:
    """Return (epochs done, steps into the next) of the run's newest checkpoint, (0, 0) if it has none."""
    newest = latest(run_dir)
    return (0, 0) if newest is None else _position(newest)


def beside(path: Path, file: str) -> Path:
    """Return where `file` about a checkpoint belongs: in its run's folder, or beside one taken out of it."""
    if path.parent.name == FOLDER:
        return path.parent.parent / file
    return path.with_name(f"{path.name}.{file}")


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed process had not yet published, or had not finished removing."""
    for path in (run_dir / FOLDER).glob(".*.tmp"):
        shutil.rmtree(path)


def load(path: Path) -> Checkpoint:
    """Load a checkpoint, or the newest one of a run's folder.

    Raises CheckpointError if there is none, a file is missing or damaged, or the weights are not the config's.
    """
    header = read_header(resolve(path))
    vae = build(header.config)
    weights = header.path / (EMA if header.config.optimiser.ema_decay else WEIGHTS)
    _load_weights(vae, weights)
    digest = hashlib.sha256(_read(weights)).hexdigest()
    return Checkpoint(**vars(header), vae=vae.eval().requires_grad_(False), weights_sha256=digest)


def read_header(path: Path) -> Header:
    """Read what a checkpoint says about itself, without its tensors; CheckpointError if it is missing or damaged."""
    config = TrainConfig.from_json(_read(path / CONFIG), str(path / CONFIG))
    try:
        record = json.loads(_read(path / PROGRESS))
        progress = Progress(**record["progress"] | {"totals": tuple(record["progress"]["totals"])})
        return Header(path, config, progress, DatasetInfo(**record["dataset"]), record["environment"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_damaged(path / PROGRESS, error)) from error


def resolve(path: Path) -> Path:
    """Return `path` if it is a checkpoint, its newest one if it is a run's folder; CheckpointError otherwise."""
    if (path / PROGRESS).is_file():
        return path
    newest = latest(path)
    if newest is None:
        raise CheckpointError(f"{path} is no checkpoint and no run's folder with one; train first: vaeserve-train fit")
    return newest


def restore(path: Path, *, vae: Vae, ema: Vae | None, optimiser: torch.optim.Optimizer) -> None:
    """Load the whole training state of a checkpoint into modules and optimiser of the same configuration."""
    _load_weights(vae, path / WEIGHTS)
    if ema is not None:
        _load_weights(ema, path / EMA)
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(_read(path / OPTIMISER)), map_location="cpu", weights_only=True)
        optimiser.load_state_dict(state)
    except (RuntimeError, UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(_damaged(path / OPTIMISER, error)) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name; CheckpointError if it is missing or damaged."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(_read(path))
    except SafetensorError as error:
        raise CheckpointError(_damaged(path, error)) from error
    return tensors


def _load_weights(module: nn.Module, path: Path) -> None:
    weights = read_weights(path)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(_damaged(path, error)) from error


def _weights(module: nn.Module) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in module.state_dict().items()})


def _optimiser_state(optimiser: torch.optim.Optimizer) -> bytes:
    buffer = io.BytesIO()
    torch.save(optimiser.state_dict(), buffer)
    return buffer.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} is damaged or belongs to another model ({reason}); use an older checkpoint, or train again"


def _position(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is no checkpoint's name")
    return int(match[1]), int(match[2] or 0)


def _remove(path: Path) -> None:
    # Renamed first: half a checkpoint must never lie under a checkpoint's name.
    retired = path.with_name(f".{path.name}{_RETIRED_SUFFIX}")
    path.rename(retired)
    shutil.rmtree(retired)

"""Fit the flow of prior.py to a trained model's aggregate posterior, and keep it beside the run.

    vaeserve-train fit-prior --run-dir runs/mnist

A prior belongs to one set of weights: its file carries their digest, and nothing uses it with others.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vaeserve_training import atomic, checkpoint
from vaeserve_training.checkpoint import Checkpoint, CheckpointError
from vaeserve_training.config import PriorConfig
from vaeserve_training.data import ImageData
from vaeserve_training.evaluate import bound
from vaeserve_training.objectives import Posterior, reparameterize, standard_normal_log_density
from vaeserve_training.optimiser import cosine
from vaeserve_training.prior import FlowPrior
from vaeserve_training.randomness import Stream, generator, seed_of

FILE = "prior.safetensors"
_ABOUT = "vaeserve.prior"
_HELD_OUT = 10  # every tenth training image chooses among the states of the fit
_CHECKS = 20  # how often it does
_MIN_STDDEV = 1e-3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedPrior:
    """A flow, how it was made, and the digest of the weights whose aggregate posterior it was fitted to."""

    flow: FlowPrior
    config: PriorConfig
    weights_sha256: str

    @property
    def sha256(self) -> str:
        """Digest of the file that it is kept in."""
        return hashlib.sha256(_content(self)).hexdigest()


def fit_prior(
    model: Checkpoint, data: ImageData, config: PriorConfig, *, advance: Callable[[int], None] | None = None
) -> FittedPrior:
    """Fit a flow to latents drawn from q(z|x) of the training images, by maximum likelihood, on the model's device.

    Of the states on the way the one is kept under which held-back training images' latents are likeliest, so that a
    small data set is not learned by heart. `advance` is told the steps. Raises CheckpointError if the images are not
    those that the model was trained on, ConfigError for fewer than 2 latents.
    """
    if data.sha256 != model.dataset.sha256:
        raise CheckpointError(
            f"the training images of {data.name} have SHA-256 {data.sha256}; {model.path} was trained on "
            f"{model.dataset.sha256}: the data set has changed since, restore it"
        )
    device = next(model.vae.parameters()).device
    posterior = bound(model.vae, data.train, model.config.objective.likelihood, seed=config.seed).posterior
    posterior = Posterior(*(part.float().to(device) for part in posterior))
    return FittedPrior(fit_flow(posterior, config, advance=advance), config, model.weights_sha256)


def fit_flow(
    posterior: Posterior,
    config: PriorConfig,
    *,
    advance: Callable[[int], None] | None = None,
    log_level: int = logging.INFO,
) -> FlowPrior:
    """Fit a flow to the mixture of these posteriors, (N, D), on their device, and return it on the CPU.

    What held-back latents cost on the way is logged at `log_level`.
    """
    device = posterior.mean.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, Stream.PRIOR))
        flow = FlowPrior(config, posterior.mean.shape[1]).to(device)
    rows = torch.arange(len(posterior.mean), device=device)
    chosen = rows % _HELD_OUT == 0
    judge = _draw(posterior, rows[chosen], generator(config.seed, Stream.PRIOR, 0, device=device))
    training = rows[~chosen] if len(rows) > 1 else rows
    _standardise(flow, Posterior(posterior.mean[training], posterior.log_variance[training]))
    optimiser = torch.optim.Adam(flow.parameters(), lr=config.learning_rate)
    best, best_nats = copy.deepcopy(flow), _cross_entropy(flow, judge)
    logger.log(
        log_level, "held-back latents cost %.2f nats under N(0, I)", -float(standard_normal_log_density(judge).mean())
    )
    for step in range(config.steps):
        source = generator(config.seed, Stream.PRIOR, 1 + step, device=device)
        picked = training[torch.randint(len(training), (config.batch_size,), generator=source, device=device)]
        loss = -flow.log_density(_draw(posterior, picked, source)).mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * cosine(step, config.steps)
        optimiser.step()
        if (step + 1) % max(1, config.steps // _CHECKS) == 0:
            nats = _cross_entropy(flow, judge)
            logger.log(log_level, "prior step %d/%d: held-back latents cost %.2f nats", step + 1, config.steps, nats)
            if nats < best_nats:
                best, best_nats = copy.deepcopy(flow), nats
        if advance:
            advance(1)
    return best.cpu().eval().requires_grad_(False)


def _draw(posterior: Posterior, rows: Tensor, source: torch.Generator) -> Tensor:
    """Return one latent from the posterior of each of these images, (N, D)."""
    mean, log_variance = posterior.mean[rows], posterior.log_variance[rows]
    return reparameterize(mean, log_variance, torch.randn(mean.shape, generator=source, device=mean.device))


def _standardise(flow: FlowPrior, posterior: Posterior) -> None:
    """Give the flow the aggregate posterior's mean and standard deviation of each latent to start from."""
    flow.mean.copy_(posterior.mean.mean(0))
    variance = posterior.mean.var(dim=0, correction=0) + posterior.log_variance.exp().mean(0)
    flow.stddev.copy_(variance.sqrt().clamp(min=_MIN_STDDEV))


@torch.no_grad()
def _cross_entropy(flow: FlowPrior, latent: Tensor) -> float:
    return -float(flow.log_density(latent).double().mean())


def default_path(path: Path) -> Path:
    """Return where the prior of a checkpoint belongs: in its run's folder, or beside a checkpoint taken out of it."""
    return checkpoint.beside(path, FILE)


def save(prior: FittedPrior, path: Path) -> None:
    """Write the prior as one safetensors file, whose metadata hold its configuration and its model's digest."""
    atomic.write_file(path, _content(prior))


def _content(prior: FittedPrior) -> bytes:
    about = {
        "config": prior.config.model_dump(mode="json"),
        "latent_size": prior.flow.latent_size,
        "weights_sha256": prior.weights_sha256,
    }
    tensors = {name: tensor.contiguous() for name, tensor in prior.flow.state_dict().items()}
    return safetensors.torch.save(tensors, {_ABOUT: json.dumps(about)})  # several keys would come in any order


def load(path: Path) -> FittedPrior:
    """Read what `save` wrote; CheckpointError if it is missing, damaged or something else."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
        config = PriorConfig.model_validate(about["config"])
        with torch.random.fork_rng(devices=[]):
            flow = FlowPrior(config, int(about["latent_size"]))
        flow.load_state_dict(checkpoint.read_weights(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is damaged or no fitted prior ({reason}); fit it again: vaeserve-train fit-prior"
        ) from error
    return FittedPrior(flow.eval().requires_grad_(False), config, str(about["weights_sha256"]))


def load_for(model: Checkpoint) -> FittedPrior | None:
    """Return the prior beside a checkpoint, None if there is none; CheckpointError if it is of other weights."""
    path = default_path(model.path)
    if not path.is_file():
        return None
    prior = load(path)
    if prior.weights_sha256 != model.weights_sha256:
        raise CheckpointError(
            f"{path} was fitted to other weights than those of {model.path}; fit it again "
            "(vaeserve-train fit-prior) or remove it"
        )
    return prior

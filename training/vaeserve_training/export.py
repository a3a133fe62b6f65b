"""From a checkpoint to a published bundle: graphs, proof that they equal the model, card, one rename.

    vaeserve-train export --run-dir runs/mnist --models models --name mnist

A prior fitted to the model becomes a third graph, and encoder and decoder may be published in float16 as well. Nothing
is published unless every graph passes onnx's full checker and the parity gate.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vaeserve.v1 import vae_pb2
from vaeserve_training import bundle, checkpoint, onnx_graphs, parity
from vaeserve_training.checkpoint import Checkpoint
from vaeserve_training.data import ImageData, load
from vaeserve_training.onnx_graphs import DecoderGraph, EncoderGraph, ExportError, HalfPrecision
from vaeserve_training.prior_fit import FittedPrior
from vaeserve_training.report import Report

_LIKELIHOODS = {
    "bernoulli": vae_pb2.LIKELIHOOD_BERNOULLI,
    "gaussian": vae_pb2.LIKELIHOOD_GAUSSIAN,
    "mse": vae_pb2.LIKELIHOOD_MSE,
}
_TOOLS = ("vaeserve", "torch", "onnx", "onnxscript", "numpy")


def export(
    checkpoint_path: Path,
    models_dir: Path,
    *,
    name: str,
    version: int | None = None,
    evaluation: Report | None = None,
    prior: FittedPrior | None = None,
    data: ImageData | None = None,
    float16: bool = False,
) -> Path:
    """Publish a checkpoint (or a run's newest) as `models_dir`/`name`/`version` and return that folder.

    `version` is the next free one if not given; `evaluation` fills the card's held-out figures; `prior` is published
    with the model; `data` spares loading the data set that the model was trained on, whose test images are among the
    inputs that prove the graphs; `float16` adds an encoder and a decoder that compute in float16. Raises
    CheckpointError, DataError, BundleError for a name or version that cannot be used, and ExportError; then nothing was
    published.
    """
    bundle.check_name(name)
    if version is not None:
        bundle.check_version_is_free(models_dir, name, version)
    model = checkpoint.load(checkpoint_path)
    data = data or load(model.config.data)
    if data.sha256 != model.dataset.sha256:
        raise ExportError(
            f"the training images of {data.name} have SHA-256 {data.sha256}; {model.path} was trained on "
            f"{model.dataset.sha256}: the data set has changed since, restore it"
        )
    if evaluation is not None and evaluation.weights_sha256 not in ("", model.weights_sha256):
        raise ExportError(f"the evaluation is of other weights than those of {model.path}; evaluate them again")
    if prior is not None and prior.weights_sha256 != model.weights_sha256:
        raise ExportError(f"the prior was fitted to other weights than those of {model.path}; fit it again")
    card = _card(model, name, evaluation, prior)
    graphs = _graphs(model, data.test, card, prior, float16=float16)
    return bundle.publish(models_dir, card, graphs, version=version)


class _Part(NamedTuple):
    """A graph's description and bytes, and the module that it has to equal on these inputs."""

    graph: vae_pb2.Graph
    content: bytes
    module: nn.Module
    inputs: parity.Array
    tolerance: float = parity.TOLERANCE


def _graphs(
    model: Checkpoint, images: NDArray[np.uint8], card: vae_pb2.ModelCard, prior: FittedPrior | None, *, float16: bool
) -> dict[str, bytes]:
    """Return the proven graphs by file name, and describe them in the card."""
    encoder, decoder = model.vae.encoder, model.vae.decoder
    image_inputs = parity.image_inputs(images)
    with torch.inference_mode():
        means = encoder(torch.from_numpy(image_inputs))[0].numpy()
    latent_inputs = parity.latent_inputs(means)
    parts = [
        _encoder(bundle.ENCODER_FILE, encoder, encoder, card, image_inputs),
        _decoder(bundle.DECODER_FILE, decoder, decoder, card, latent_inputs),
    ]
    if prior is not None:
        content = onnx_graphs.build_prior(prior.flow, card.latent_shape, card.digest)
        parts.append(_Part(_graph(vae_pb2.GRAPH_ROLE_PRIOR, bundle.PRIOR_FILE), content, prior.flow, latent_inputs))
    halves = []
    if float16:  # the prior stays as it is: it is small, and its steps undo each other only where they are exact
        halves = [
            _encoder(bundle.ENCODER_FLOAT16_FILE, HalfPrecision(encoder), encoder, card, image_inputs),
            _decoder(bundle.DECODER_FLOAT16_FILE, HalfPrecision(decoder), decoder, card, latent_inputs),
        ]
        halves = [part._replace(tolerance=parity.FLOAT16_TOLERANCE) for part in halves]
    for part in (*parts, *halves):
        measured = parity.measure(part.graph.file, part.content, part.module, part.inputs, part.tolerance)
        part.graph.parity.extend(measured)
    card.graphs.extend(part.graph for part in parts)
    card.float16_graphs.extend(part.graph for part in halves)
    return {part.graph.file: part.content for part in (*parts, *halves)}


def _encoder(file: str, run: nn.Module, exact: nn.Module, card: vae_pb2.ModelCard, inputs: parity.Array) -> _Part:
    """Return the graph of `run`, which is to equal `exact`."""
    content = onnx_graphs.build_encoder(EncoderGraph(run), card.image_shape, card.digest)
    return _Part(_graph(vae_pb2.GRAPH_ROLE_ENCODER, file), content, EncoderGraph(exact), inputs)


def _decoder(file: str, run: nn.Module, exact: nn.Module, card: vae_pb2.ModelCard, inputs: parity.Array) -> _Part:
    """Return the graph of `run`, which is to equal `exact`."""
    content = onnx_graphs.build_decoder(DecoderGraph(run), card.latent_shape, card.digest)
    return _Part(_graph(vae_pb2.GRAPH_ROLE_DECODER, file), content, DecoderGraph(exact), inputs)


def _graph(role: vae_pb2.GraphRole, file: str) -> vae_pb2.Graph:
    return vae_pb2.Graph(role=role, file=file, opset=onnx_graphs.OPSET)


def _card(model: Checkpoint, name: str, evaluation: Report | None, prior: FittedPrior | None) -> vae_pb2.ModelCard:
    """Return the card, all but the graphs and the version."""
    config, dataset = model.config, model.dataset
    binarised = config.objective.likelihood == "bernoulli"
    card = vae_pb2.ModelCard(
        schema_version=bundle.SCHEMA_VERSION,
        name=name,
        digest=_digest(model, prior),
        image_shape=config.data.image_shape,
        latent_shape=[model.vae.latent_size],
        likelihood=_LIKELIHOODS[config.objective.likelihood],
        sigma=model.vae.sigma,
        beta=config.objective.beta,
        encoder_input=vae_pb2.ENCODER_INPUT_BINARISED if binarised else vae_pb2.ENCODER_INPUT_GREY,
        dataset=vae_pb2.Dataset(
            name=dataset.name,
            sha256=dataset.sha256,
            train_images=dataset.train_images,
            test_images=dataset.test_images,
        ),
        # Where the data lay is nobody's business who is served the card.
        training_config_json=config.with_changes(data={"path": None, "cache_dir": None}).model_dump_json(),
        tool_versions={tool: metadata.version(tool) for tool in _TOOLS}
        | {"python": platform.python_version(), "onnxruntime": parity.ONNXRUNTIME_VERSION},
    )
    card.created.GetCurrentTime()
    if evaluation is not None:
        card.evaluations.extend(evaluation.evaluations)
        card.latent_statistics.CopyFrom(evaluation.latent_statistics)
    return card


def _digest(model: Checkpoint, prior: FittedPrior | None) -> str:
    parts: dict[str, nn.Module] = {"encoder": model.vae.encoder, "decoder": model.vae.decoder}
    if prior is not None:
        parts["prior"] = prior.flow
    weights = {
        f"{part}.{name}": tensor.numpy()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    architecture: dict[str, object] = {"image_shape": list(model.config.data.image_shape)}
    # How the first weights were drawn changes no graph.
    architecture |= model.config.model.model_dump(mode="json", exclude={"initialisation"})
    if prior is not None:
        architecture["prior"] = prior.config.model_dump(mode="json", include={"couplings", "hidden"})
    return bundle.digest(weights, architecture, onnx_graphs.SETTINGS)

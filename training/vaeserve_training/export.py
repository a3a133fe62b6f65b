"""From a checkpoint to a published bundle: graphs, proof that they equal the model, card, one rename.

    vaeserve-train export --run-dir runs/mnist --models models --name mnist

A prior fitted to the model becomes a third graph. Nothing is published unless every graph passes onnx's full checker
and the parity gate.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vaeserve.v1 import vae_pb2
from vaeserve_training import bundle, checkpoint, onnx_graphs, parity
from vaeserve_training.checkpoint import Checkpoint
from vaeserve_training.data import ImageData, load
from vaeserve_training.onnx_graphs import DecoderGraph, EncoderGraph, ExportError
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
) -> Path:
    """Publish a checkpoint (or a run's newest) as `models_dir`/`name`/`version` and return that folder.

    `version` is the next free one if not given; `evaluation` fills the card's held-out figures; `prior` is published
    with the model; `data` spares loading the data set that the model was trained on, whose test images are among the
    inputs that prove the graphs. Raises
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
    graphs = _graphs(model, data.test, card, prior)
    return bundle.publish(models_dir, card, graphs, version=version)


def _graphs(
    model: Checkpoint, images: NDArray[np.uint8], card: vae_pb2.ModelCard, prior: FittedPrior | None
) -> dict[str, bytes]:
    """Return the proven graphs by file name, and describe them in the card."""
    encoder, decoder = EncoderGraph(model.vae.encoder), DecoderGraph(model.vae.decoder)
    image_inputs = parity.image_inputs(images)
    with torch.inference_mode():
        means = encoder(torch.from_numpy(image_inputs))[0].numpy()
    latent_inputs = parity.latent_inputs(means)
    parts: list[tuple[vae_pb2.Graph, bytes, nn.Module, parity.Array]] = [
        (
            vae_pb2.Graph(role=vae_pb2.GRAPH_ROLE_ENCODER, file=bundle.ENCODER_FILE, opset=onnx_graphs.OPSET),
            onnx_graphs.build_encoder(encoder, card.image_shape, card.digest),
            encoder,
            image_inputs,
        ),
        (
            vae_pb2.Graph(role=vae_pb2.GRAPH_ROLE_DECODER, file=bundle.DECODER_FILE, opset=onnx_graphs.OPSET),
            onnx_graphs.build_decoder(decoder, card.latent_shape, card.digest),
            decoder,
            latent_inputs,
        ),
    ]
    if prior is not None:
        graph = vae_pb2.Graph(role=vae_pb2.GRAPH_ROLE_PRIOR, file=bundle.PRIOR_FILE, opset=onnx_graphs.OPSET)
        content = onnx_graphs.build_prior(prior.flow, card.latent_shape, card.digest)
        parts.append((graph, content, prior.flow, latent_inputs))
    for graph, content, module, inputs in parts:
        graph.parity.extend(parity.measure(graph.file, content, module, inputs))
        card.graphs.append(graph)
    return {graph.file: content for graph, content, _, _ in parts}


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

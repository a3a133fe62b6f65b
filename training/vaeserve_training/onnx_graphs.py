"""Turn encoder, decoder and fitted prior into the bytes of ONNX graphs that depend on nothing but what they compute.

The same weights give the same bytes in any process on any day, so that a digest means something. What PyTorch's
exporter adds for its own debugging (a stack trace with local paths at every node, among others) is taken out again.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx
import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from vaeserve_training import bundle
from vaeserve_training.models import LATENT_RANGE, LOG_VARIANCE_RANGE

# The opset that the exporter's operators are written in: a later one would put a version converter between the model
# and the file and gain nothing that these graphs use; and every ONNX Runtime since 1.14 runs it.
OPSET = 18
# Whatever changes a graph beside weights and architecture; part of the bundle's digest.
SETTINGS = {
    "opset": OPSET,
    "precision": "float32",
    "log_variance_range": list(LOG_VARIANCE_RANGE),
    "latent_range": list(LATENT_RANGE),
}
_EXAMPLE_ROWS = 2  # the exporter takes an axis of length 1 for a constant
_CHATTY_LOGGER = "torch.onnx._internal.exporter._registration"  # misses torchvision, which these graphs do not need


class ExportError(Exception):
    """A model that cannot be exported. The message says why; nothing was published."""


class EncoderGraph(nn.Module):
    """Image (N, C, H, W) -> mean and standard deviation, (N, D) each, as the bundle's encoder gives them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, stddev); the encoder has clamped the log-variance."""
        mean, log_variance = self.encoder(image)
        return mean, torch.exp(0.5 * log_variance)


class DecoderGraph(nn.Module):
    """Latent (N, D) -> image (N, C, H, W) in 0..1, as the bundle's decoder gives it."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor) -> Tensor:
        """Return the decoder's image."""
        image: Tensor = self.decoder(latent)
        return image


class HalfPrecision(nn.Module):
    """A copy of an encoder or a decoder that computes in float16 what it is given, and gives, in float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).half()

    def forward(self, value: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the module's results for `value`, each in float32."""
        result: Tensor | tuple[Tensor, ...] = self.module(value.half())
        return tuple(part.float() for part in result) if isinstance(result, tuple) else result.float()


def build_encoder(module: EncoderGraph, image_shape: Sequence[int], digest: str) -> bytes:
    """Return the graph `image` -> `mean`, `stddev` that carries `digest`; ExportError if it cannot be made."""
    model = _convert(module, image_shape, "image", ["mean", "stddev"])
    return _finish(model, "encoder", digest)


def build_decoder(module: DecoderGraph, latent_shape: Sequence[int], digest: str) -> bytes:
    """Return the graph `latent` -> `image` that carries `digest`; ExportError if it cannot be made."""
    model = _convert(module, latent_shape, "latent", ["image"])
    return _finish(model, "decoder", digest)


def build_prior(module: nn.Module, latent_shape: Sequence[int], digest: str) -> bytes:
    """Return the graph `noise` -> `latent` that carries `digest`; ExportError if it cannot be made."""
    model = _convert(module, latent_shape, "noise", ["latent"])
    return _finish(model, "prior", digest)


def _convert(module: nn.Module, row_shape: Sequence[int], input_name: str, output_names: list[str]) -> onnx.ModelProto:
    """Return what PyTorch's exporter makes of the module, with a free batch axis and the weights inside."""
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module.eval(),
                (torch.zeros(_EXAMPLE_ROWS, *row_shape),),
                dynamo=True,
                input_names=[input_name],
                output_names=output_names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"PyTorch cannot export {type(module).__name__}: {error}") from error
    if program is None:
        raise ExportError(f"PyTorch's exporter gave nothing for {type(module).__name__}")
    return program.model_proto


def _finish(model: onnx.ModelProto, graph_name: str, digest: str) -> bytes:
    """Return the serialised model with our metadata instead of the exporter's, checked in full."""
    _strip(model)
    model.graph.name = graph_name
    model.producer_name = "vaeserve"
    model.producer_version = ""
    model.metadata_props.add(key=bundle.DIGEST_KEY, value=digest)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the {graph_name} is no valid ONNX graph: {error}") from error
    return model.SerializeToString(deterministic=True)


def _strip(message: Message) -> None:
    """Remove every comment the exporter left, from the model down to each node, value and tensor."""
    for field, value in message.ListFields():
        if field.name in {"metadata_props", "doc_string"}:
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                _strip(part)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about itself, by name; anything else it says is still heard."""
    logger = logging.getLogger(_CHATTY_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # It copies its own tree specifications with a class that it has itself deprecated.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)

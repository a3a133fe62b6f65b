"""Good requests of every RPC, as JSON, for the models of `bundles.write_several`: where hostile ones start from."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from vaeserve import tensors


def good_requests(message: Descriptor) -> list[Message]:
    """Return good requests of a type; where none is known, the empty one."""
    made = message_factory.GetMessageClass(message)
    known = [json_format.ParseDict(example, made()) for example in _GOOD.get(message.full_name, [])]
    return known or [made()]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _tensor(array: np.ndarray) -> dict[str, Any]:
    return json_format.MessageToDict(tensors.to_tensor(array))


def _latent() -> dict[str, Any]:
    return {"name": "latent", "datatype": "FP32", "shape": [1, 2, 4, 4], "contents": {"fp32Contents": [0.5] * 32}}


_MNIST, _FACES = {"name": "mnist"}, {"name": "faces", "version": "9", "digest": "d" * 64}
_SAMPLE = {"model": _MNIST, "count": 3, "seed": "7"}
_GOOD: dict[str, list[dict[str, Any]]] = {
    "vaeserve.v1.EncodeRequest": [
        {"model": _MNIST, "images": _tensor(np.zeros((1, 1, 28, 28), np.uint8))},
        {"model": _MNIST, "images": _tensor(np.ones((2, 1, 28, 28), np.float16)), "wantLatents": True, "seed": "7"},
        {"model": _FACES, "images": _tensor(np.full((1, 3, 8, 8), 0.5, np.float32)), "wantLatents": True},
    ],
    "vaeserve.v1.DecodeRequest": [
        {"model": _MNIST, "latents": _tensor(np.ones((2, 4), np.float32))},
        {"model": _FACES, "latents": _tensor(np.ones((1, 2, 4, 4), np.float16)), "imageDtype": 2},
    ],
    "vaeserve.v1.SampleRequest": [
        _SAMPLE,
        {**_SAMPLE, "model": _FACES, "prior": 2, "temperature": 0.5, "imageDtype": 2, "wantLatents": True},
    ],
    "vaeserve.v1.GetModelRequest": [{"model": _MNIST}, {"model": _FACES}],
    "grpc.health.v1.HealthCheckRequest": [{"service": "vaeserve.v1.VaeService"}],
    "grpc.reflection.v1alpha.ServerReflectionRequest": [
        {"listServices": ""},
        {"fileByFilename": "vaeserve/v1/vae.proto"},
        {"fileContainingSymbol": "vaeserve.v1.VaeService"},
        {"fileContainingExtension": {"containingType": "google.protobuf.FileOptions", "extensionNumber": 1}},
        {"allExtensionNumbersOfType": "google.protobuf.FileOptions"},
    ],
    "inference.ModelReadyRequest": [{"name": "mnist-encoder"}, {"name": "faces-sampler", "version": "9"}],
    "inference.ModelMetadataRequest": [{"name": "mnist-decoder"}],
    "inference.ModelConfigRequest": [{"name": "faces-sampler", "version": "9"}],
    "inference.ModelInferRequest": [
        {
            "modelName": "mnist-encoder",
            "id": "1",
            "inputs": [{"name": "image", "datatype": "FP32", "shape": ["1", "1", "28", "28"]}],
            "rawInputContents": [_base64(bytes(3136))],
        },
        {
            "modelName": "faces-decoder",
            "inputs": [
                {"name": "latent", "datatype": "FP32", "shape": [1, 2, 4, 4], "contents": {"fp32Contents": [0.5] * 32}}
            ],
            "outputs": [{"name": "image"}],
            "parameters": {"digest": {"stringParam": "d" * 64}, "image_datatype": {"stringParam": "UINT8"}},
        },
        {
            "modelName": "faces-sampler",
            "inputs": [
                {"name": "count", "datatype": "INT32", "shape": [1], "contents": {"intContents": [2]}},
                {"name": "seed", "datatype": "UINT64", "shape": [1], "contents": {"uint64Contents": ["7"]}},
            ],
            "parameters": {"prior": {"stringParam": "fitted"}, "temperature": {"doubleParam": 0.5}},
        },
    ],
}

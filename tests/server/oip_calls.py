"""The Open Inference Protocol as tests speak it: tritonclient in both flavours, and native requests translated."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import tritonclient.grpc as blocking
from tritonclient.grpc import aio, service_pb2

from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb

FLAVOURS = ["blocking", "asyncio"]
DATATYPES = {
    pb.DATA_TYPE_FLOAT32: "FP32",
    pb.DATA_TYPE_UINT8: "UINT8",
    pb.DATA_TYPE_FLOAT16: "FP16",
}
PRIORS = {pb.PRIOR_STANDARD_NORMAL: "standard_normal", pb.PRIOR_FITTED: "fitted"}


class Triton:
    """Tritonclient's client of one flavour, a connection for each call: methods by name, all of them blocking."""

    def __init__(self, flavour: str, target: str) -> None:
        self._flavour = flavour
        self._target = target

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._flavour == "blocking":
                with blocking.InferenceServerClient(self._target) as client:
                    return getattr(client, method)(*args, **kwargs)
            return asyncio.run(self._call(method, *args, **kwargs))

        return call

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        async with aio.InferenceServerClient(self._target) as client:
            return await getattr(client, method)(*args, **kwargs)


def inputs(**arrays: np.ndarray) -> list[blocking.InferInput]:
    """Return tritonclient's inputs."""
    made = []
    for name, array in arrays.items():
        datatype = blocking.np_to_triton_dtype(array.dtype)
        made.append(blocking.InferInput(name, array.shape, datatype).set_data_from_numpy(array))
    return made


def outputs(*names: str) -> list[blocking.InferRequestedOutput]:
    """Return tritonclient's requested outputs."""
    return [blocking.InferRequestedOutput(name) for name in names]


def scalars(**values: int) -> list[blocking.InferInput]:
    """Return inputs of one number each: count INT32, seed UINT64."""
    dtypes = {"count": np.int32, "seed": np.uint64}
    return inputs(**{name: np.array([value], dtypes[name]) for name, value in values.items()})


def request(model: str, version: str = "", parameters: Mapping[str, Any] | None = None, **fields: Any) -> Any:
    """Return a ModelInferRequest with nothing in it yet."""
    made = service_pb2.ModelInferRequest(model_name=model, model_version=version, **fields)
    kinds = {str: "string_param", float: "double_param", int: "uint64_param", bool: "bool_param"}
    for name, value in (parameters or {}).items():
        setattr(made.parameters[name], kinds[type(value)], value)
    return made


def add(made: Any, name: str, datatype: str, shape: Any, raw: bytes | None = None, **contents: Any) -> Any:
    """Add an input, with raw contents or typed ones, and return the request."""
    tensor = made.inputs.add(name=name, datatype=datatype, shape=shape)
    if raw is not None:
        made.raw_input_contents.append(raw)
    if contents:
        tensor.contents.CopyFrom(service_pb2.InferTensorContents(**contents))
    return made


def translated(native: Any) -> Any:
    """Return the ModelInferRequest that asks for the same as an Encode, Decode or Sample request."""
    parameters: dict[str, Any] = {"digest": native.model.digest} if native.model.digest else {}
    if getattr(native, "image_dtype", 0):
        parameters["image_datatype"] = DATATYPES[native.image_dtype]
    roles = {pb.EncodeRequest: "encoder", pb.DecodeRequest: "decoder", pb.SampleRequest: "sampler"}
    name, version = f"{native.model.name}-{roles[type(native)]}", native.model.version
    if not isinstance(native, pb.SampleRequest):
        made = request(name, version, parameters)
        field, here = ("images", "image") if isinstance(native, pb.EncodeRequest) else ("latents", "latent")
        if native.HasField(field):
            tensor: pb.Tensor = getattr(native, field)
            add(made, here, DATATYPES[tensor.dtype], tensor.shape, tensor.data)
        return made
    parameters |= {name: getattr(native, name) for name in ("first_row", "temperature") if getattr(native, name)}
    if native.prior:
        parameters["prior"] = PRIORS[native.prior]
    made = add(request(name, version, parameters), "count", "INT32", [1], np.int32(native.count).tobytes())
    return add(made, "seed", "UINT64", [1], np.uint64(native.seed).tobytes()) if native.HasField("seed") else made


def arrays(response: Any) -> dict[str, np.ndarray]:
    """Return the raw outputs of a ModelInferResponse."""
    assert len(response.raw_output_contents) == len(response.outputs)
    dtypes = {"FP32": "<f4", "UINT8": "u1", "FP16": "<f2", "UINT64": "<u8"}
    return {
        tensor.name: np.frombuffer(raw, dtypes[tensor.datatype]).reshape(tensor.shape)
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def native_arrays(response: Any) -> dict[str, np.ndarray]:
    """Return the arrays of an Encode, Decode or Sample answer under the protocol's names."""
    names = {"mean": "mean", "stddev": "stddev", "images": "image", "latents": "latent"}
    return {
        names[field.name]: tensors.from_tensor(value)
        for field, value in response.ListFields()
        if isinstance(value, pb.Tensor)
    }

"""The Open Inference Protocol v2 (`inference.GRPCInferenceService`), as Triton's and KServe's clients speak it.

It is another face of the same service: the same engines, queues, checks, errors and figures. The protocol's messages
are those that tritonclient's wheel has (extra `oip`); nothing imports this module unless the protocol is wanted.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from tritonclient.grpc import model_config_pb2 as config_pb
from tritonclient.grpc import service_pb2 as pb

from vaeserve_server import oip_tensors, oip_wire
from vaeserve_server.calls import Method
from vaeserve_server.checks import Array
from vaeserve_server.engine import Engine
from vaeserve_server.errors import CallError, InvalidInputError, NotFoundError, NotOfferedError, shown
from vaeserve_server.oip_models import DIGEST, ROWS, TIMEOUT, VIEWS, Port, View
from vaeserve_server.oip_parameters import Parameters
from vaeserve_server.service import VaeService
from vaeserve_server.stats import MethodStats

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_PLATFORM, _BACKEND = "onnxruntime_onnx", "onnxruntime"
# Where the fields of the native contract are here.
_FIELDS = {
    "images": "inputs.image",
    "latents": "inputs.latent",
    "count": "inputs.count",
    "seed": "inputs.seed",
    "first_row": "parameters.first_row",
    "temperature": "parameters.temperature",
}
_INSTEAD = {
    "ModelStreamInfer": "every call here is unary; use ModelInfer, several calls at once",
    "ModelStatistics": "the server's figures are on its Prometheus page, /metrics",
    "RepositoryModelLoad": "the server serves what its models folder holds",
    "RepositoryModelUnload": "the server serves what its models folder holds",
}


def methods(service: VaeService, is_serving: Callable[[str], bool]) -> list[Method]:
    """Return the protocol's methods on the engines of `service`; those that are not offered refuse politely.

    `is_serving` is the health service's answer to a service's name, and to a model's.
    """
    face = _Inference(service, is_serving)
    answers: dict[str, Callable[[Any, float], Awaitable[Any]]] = {
        "ServerLive": face.server_live,
        "ServerReady": face.server_ready,
        "ModelReady": face.model_ready,
        "ServerMetadata": face.server_metadata,
        "ModelMetadata": face.model_metadata,
        "ModelConfig": face.model_config,
        "RepositoryIndex": face.repository_index,
        "ModelInfer": face.model_infer,
    }
    # Which queue a call is for is known only once it is read, so it is refused unread while all of them are full.
    retries: dict[str, Callable[[], float | None]] = {"ModelInfer": service.retry_any_s}
    offered = [
        Method(
            _SERVICE.full_name,
            name,
            _parser(name),
            answer,
            MethodStats(name),
            retry_after_s=retries.get(name, lambda: None),
        )
        for name, answer in answers.items()
    ]
    others = MethodStats("NotOffered")
    return offered + [
        Method(_SERVICE.full_name, method.name, bytes, _refusal(method.name), others, read=False)
        for method in _SERVICE.methods
        if method.name not in answers
    ]


class _Inference:
    """The RPCs that are offered. Each takes its request and a deadline, of time.monotonic()."""

    def __init__(self, service: VaeService, is_serving: Callable[[str], bool]) -> None:
        self._service = service
        self._is_serving = is_serving

    async def server_live(self, request: Any, deadline: float) -> Any:
        """Say yes."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, deadline: float) -> Any:
        """Say whether to send calls here, as the standard health service does."""
        return pb.ServerReadyResponse(ready=self._is_serving(""))

    async def model_ready(self, request: Any, deadline: float) -> Any:
        """Say the same of a model. One that is unknown is not ready; that is no error."""
        try:
            _, engine = self._resolve(request.name, request.version)
        except CallError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._is_serving(engine.label))

    async def server_metadata(self, request: Any, deadline: float) -> Any:
        """Name the server and the protocol's extensions that it has."""
        return pb.ServerMetadataResponse(
            name="vaeserve", version=version("vaeserve"), extensions=["model_configuration"]
        )

    async def model_metadata(self, request: Any, deadline: float) -> Any:
        """Return the names, datatypes and shapes of a model's tensors, and the versions that are served."""
        view, engine = self._resolve(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[e.card.version for e in self._service.repository().engines if e.card.name == engine.card.name],
            platform=_PLATFORM,
            inputs=[_metadata(port) for port in view.inputs(engine)],
            outputs=[_metadata(port) for port in view.outputs(engine)],
        )

    async def model_config(self, request: Any, deadline: float) -> Any:
        """Return the same in Triton's words, with the most rows of a call."""
        view, engine = self._resolve(request.name, request.version)
        config = config_pb.ModelConfig(
            name=request.name,
            platform=_PLATFORM,
            backend=_BACKEND,
            max_batch_size=engine.max_rows_per_call if view.batches else 0,
            input=[config_pb.ModelInput(optional=port.optional, **_config(port, view)) for port in view.inputs(engine)],
            output=[config_pb.ModelOutput(**_config(port, view)) for port in view.outputs(engine)],
        )
        if view.batches:
            config.dynamic_batching.SetInParent()
        config.parameters[DIGEST].string_value = engine.card.digest
        return pb.ModelConfigResponse(config=config)

    async def repository_index(self, request: Any, deadline: float) -> Any:
        """List every model and version."""
        index = pb.RepositoryIndexResponse()
        for engine in self._service.repository().engines:
            for view in VIEWS:
                name = f"{engine.card.name}-{view.role}"
                state = "UNAVAILABLE" if engine.problem else "READY"
                index.models.add(name=name, version=engine.card.version, state=state, reason=engine.problem)
        return index

    async def model_infer(self, request: Any, deadline: float) -> Any:
        """Ask the engine, and answer in the form of the request: raw contents for raw ones, typed for typed ones."""
        view, engine = self._resolve(request.model_name, request.model_version)
        try:
            parameters = Parameters(request.parameters, view.parameters, request.model_name)
            self._service.repository().resolve(engine.card.name, engine.card.version, parameters.text(DIGEST))
            wanted = oip_tensors.wanted(request, [port.name for port in view.outputs(engine)])
            outputs = await view.infer(engine, _inputs(request, view, engine), parameters, _end(parameters, deadline))
        except InvalidInputError as error:
            noun, dot, field = error.field.partition(".")
            error.field = _FIELDS.get(noun, noun) + dot + field
            raise
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=engine.card.version, id=request.id
        )
        response.parameters[DIGEST].string_param = engine.card.digest
        typed = not request.raw_input_contents
        oip_tensors.write(response, {name: outputs[name] for name in wanted}, typed=typed)
        return response

    def _resolve(self, name: str, model_version: str) -> tuple[View, Engine]:
        """Return what a model's name stands for; NotFoundError, NotServingError."""
        repository = self._service.repository()
        names = list(dict.fromkeys(engine.card.name for engine in repository.engines))
        base, _, role = name.rpartition("-")
        view = next((view for view in VIEWS if view.role == role), None)
        if view is None or base not in names:
            served = ", ".join(f"{name}-{view.role}" for name in names for view in VIEWS)
            raise NotFoundError(f"there is no model {shown(name)}; this server has {served}")
        return view, repository.resolve(base, model_version, "")


def _parser(name: str) -> Callable[[bytes], Any]:
    parse: Callable[[bytes], Any] = getattr(pb, f"{name}Request").FromString
    if name != "ModelInfer":
        return parse

    def checked(payload: bytes) -> Any:
        oip_wire.check(payload)
        return parse(payload)

    return checked


def _refusal(name: str) -> Callable[[Any, float], Awaitable[Any]]:
    instead = _INSTEAD.get(name, "see ServerMetadata for what is")

    async def refuse(request: Any, deadline: float) -> Any:
        raise NotOfferedError(f"{name} is not offered; {instead}")

    return refuse


def _inputs(request: Any, view: View, engine: Engine) -> dict[str, Array]:
    ports = view.inputs(engine)
    required = [port.name for port in ports if not port.optional]
    return oip_tensors.read(request, required, [port.name for port in ports if port.optional])


def _end(parameters: Parameters, deadline: float) -> float:
    """Return the earlier of the call's deadline and the end of the timeout, in microseconds, that the request names."""
    timeout_us = parameters.integer(TIMEOUT)
    return min(deadline, time.monotonic() + timeout_us * 1e-6) if timeout_us else deadline


def _metadata(port: Port) -> Any:
    return pb.ModelMetadataResponse.TensorMetadata(name=port.name, datatype=port.datatype, shape=port.shape)


def _config(port: Port, view: View) -> dict[str, Any]:
    # Triton leaves out the axis of rows where it says max_batch_size.
    dims = port.shape[1:] if view.batches and port.shape[0] == ROWS else port.shape
    return {"name": port.name, "data_type": getattr(config_pb, f"TYPE_{port.datatype}"), "dims": dims}

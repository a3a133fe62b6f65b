"""A small server whose faults are scripted: it refuses, delays, changes its model, and remembers what it was asked.

Its model is simple on purpose. An image's mean is its first D pixels as 0..1, its stddev is 1; a latent's image holds
the latent in its first D pixels; "noise" is the row number. So each row's answer tells which row it belongs to.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vaeserve import tensors
from vaeserve.v1 import vae_pb2, vae_pb2_grpc

LATENT = 3
IMAGE_SHAPE = (1, 4, 5)
DIGESTS = {"1": "1" * 64, "2": "2" * 64}

Fault = Callable[[grpc.ServicerContext], None]


@dataclass
class Asked:
    """One call as the server got it."""

    method: str
    rows: int
    digest: str
    seed: int | None = None
    first_row: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


def refuse(code: grpc.StatusCode, words: str = "refused", **trailing: str) -> Fault:
    """Return a fault that ends the call; `trailing` is metadata, with _ for -."""

    def fault(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(tuple((key.replace("_", "-"), value) for key, value in trailing.items()))
        context.abort(code, words)

    return fault


class FaultyService(vae_pb2_grpc.VaeServiceServicer):
    """`faults` are used up one a call, first come first served; `hook` runs in every call that none of them met."""

    def __init__(self, image_shape: tuple[int, ...] = IMAGE_SHAPE, max_rows_per_call: int = 0) -> None:
        self.image_shape = image_shape
        self.max_rows_per_call = max_rows_per_call
        self.faults: list[Fault] = []
        self.hook: Callable[[Asked], None] = lambda asked: None
        self.version = "1"
        self.served = ["1", "2"]
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def calls(self, method: str) -> list[Asked]:
        """Return the calls of one method in the order they came."""
        return [each for each in self.asked if each.method == method]

    @contextmanager
    def _call(self, asked: Asked, context: grpc.ServicerContext, model: vae_pb2.ModelRef) -> Iterator[vae_pb2.ModelRef]:
        asked.metadata = dict(context.invocation_metadata())
        with self._lock:
            self.asked.append(asked)
            fault = self.faults.pop(0) if self.faults else None
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if fault:
                fault(context)
            self.hook(asked)
            yield self._resolve(model, context)
        finally:
            with self._lock:
                self._at_once -= 1

    def _resolve(self, model: vae_pb2.ModelRef, context: grpc.ServicerContext) -> vae_pb2.ModelRef:
        version = model.version or self.version
        if version not in self.served:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no version {version}")
        if model.digest not in ("", DIGESTS[version]):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"digest of another model than {version}")
        return vae_pb2.ModelRef(name="fake", version=version, digest=DIGESTS[version])

    def GetModel(self, request, context):  # noqa: N802
        with self._call(Asked("GetModel", 0, request.model.digest), context, request.model) as model:
            return self._describe(model.version)

    def ListModels(self, request, context):  # noqa: N802
        with self._call(Asked("ListModels", 0, ""), context, vae_pb2.ModelRef()):
            return vae_pb2.ListModelsResponse(models=[self._describe(version) for version in reversed(self.served)])

    def _describe(self, version: str) -> vae_pb2.GetModelResponse:
        card = vae_pb2.ModelCard(
            name="fake",
            version=version,
            digest=DIGESTS[version],
            image_shape=self.image_shape,
            latent_shape=[LATENT],
            encoder_input=vae_pb2.ENCODER_INPUT_GREY,
        )
        return vae_pb2.GetModelResponse(
            card=card, serving=vae_pb2.Serving(provider="Fake", max_rows_per_call=self.max_rows_per_call)
        )

    def Encode(self, request, context):  # noqa: N802
        images = tensors.from_tensor(request.images)
        asked = Asked("Encode", len(images), request.model.digest, request.seed, request.first_row)
        with self._call(asked, context, request.model) as model:
            mean = images.reshape(len(images), -1)[:, :LATENT].astype(np.float32)
            if images.dtype == np.uint8:
                mean /= 255
            # The version is in the answer, so that a mixed result would show.
            stddev = np.full_like(mean, float(model.version))
            answer = vae_pb2.EncodeResponse(model=model, mean=tensors.to_tensor(mean), stddev=tensors.to_tensor(stddev))
            if request.want_latents:
                answer.latents.CopyFrom(tensors.to_tensor(mean + _noise(request, len(images))))
                answer.seed = request.seed
            return answer

    def Decode(self, request, context):  # noqa: N802
        latents = tensors.from_tensor(request.latents)
        with self._call(Asked("Decode", len(latents), request.model.digest), context, request.model) as model:
            images = self._images(latents, request.image_dtype)
            return vae_pb2.DecodeResponse(model=model, images=tensors.to_tensor(images))

    def Sample(self, request, context):  # noqa: N802
        asked = Asked("Sample", request.count, request.model.digest, request.seed, request.first_row)
        with self._call(asked, context, request.model) as model:
            latents = np.zeros((request.count, LATENT), np.float32) + _noise(request, request.count)
            images = tensors.to_tensor(self._images(latents, request.image_dtype))
            return vae_pb2.SampleResponse(
                model=model, images=images, latents=tensors.to_tensor(latents), seed=request.seed
            )

    def _images(self, latents: np.ndarray, image_dtype: int) -> np.ndarray:
        images = np.zeros((len(latents), *self.image_shape), np.float32)
        images.reshape(len(latents), -1)[:, :LATENT] = latents
        dtype = tensors.numpy_dtype(image_dtype or tensors.FLOAT32)
        return (images * 255 if dtype == np.uint8 else images).astype(dtype)


def _noise(request: Any, rows: int) -> np.ndarray:
    return (request.first_row + np.arange(rows, dtype=np.float32))[:, None]


class FakeHealth(health_pb2_grpc.HealthServicer):
    """The standard health service; `statuses` are what Watch says in turn, the last of them what Check says.

    A Watch ends after its last status, or when it is no longer `held`.
    """

    def __init__(self) -> None:
        self.statuses = [health_pb2.HealthCheckResponse.SERVING]
        self.watched = threading.Event()
        self.held: threading.Event | None = None

    def Check(self, request, context):  # noqa: N802
        return health_pb2.HealthCheckResponse(status=self.statuses[-1])

    def Watch(self, request, context):  # noqa: N802
        self.watched.set()
        for status in self.statuses:
            yield health_pb2.HealthCheckResponse(status=status)
        if self.held is not None:
            self.held.wait(20)


class FaultyServer:
    """The services and where they are."""

    def __init__(self, service: FaultyService, target: str) -> None:
        self.service = service
        self.health = FakeHealth()
        self.target = target


@contextmanager
def faulty_server(
    service: FaultyService | None = None, *, port: int = 0, credentials: grpc.ServerCredentials | None = None
) -> Iterator[FaultyServer]:
    """Serve on 127.0.0.1, on a free port unless one is named."""
    limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(16), options=limits)
    address = f"127.0.0.1:{port}"
    bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    running = FaultyServer(service or FaultyService(), f"127.0.0.1:{bound}")
    vae_pb2_grpc.add_VaeServiceServicer_to_server(running.service, server)
    health_pb2_grpc.add_HealthServicer_to_server(running.health, server)
    server.start()
    try:
        yield running
    finally:
        server.stop(None).wait()

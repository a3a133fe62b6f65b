"""Message <-> array, one engine call per RPC: the service as the contract says it, behind any transport."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vaeserve import tensors
from vaeserve.v1 import vae_pb2
from vaeserve_server.bundle import DECODER, ENCODER
from vaeserve_server.engine import Engine
from vaeserve_server.errors import InvalidInputError, NotServingError
from vaeserve_server.graphs import Runtime
from vaeserve_server.noise import draw_seed
from vaeserve_server.repository import Repository
from vaeserve_server.work import Noise

SERVICE_NAME = vae_pb2.DESCRIPTOR.services_by_name["VaeService"].full_name

_FLOAT32 = np.dtype(np.float32)
_PRECISIONS = {"fp32": vae_pb2.DATA_TYPE_FLOAT32, "fp16": vae_pb2.DATA_TYPE_FLOAT16}
_FITTED_PRIOR = {
    vae_pb2.PRIOR_UNSPECIFIED: False,
    vae_pb2.PRIOR_STANDARD_NORMAL: False,
    vae_pb2.PRIOR_FITTED: True,
}


class VaeService:
    """The five RPCs. Each takes its request and a deadline, of time.monotonic(), and may raise any CallError."""

    def __init__(self) -> None:
        self._repository: Repository | None = None
        self._refusal = "the server is loading its models; try again"
        self._models: dict[Engine, vae_pb2.GetModelResponse] = {}
        self._refs: dict[Engine, vae_pb2.ModelRef] = {}

    def open(self, repository: Repository, runtime: Runtime) -> None:
        """Answer calls with the engines of `repository`, from now on; those that are in keep theirs."""
        self._models = {engine: _describe(engine, runtime) for engine in repository.engines}
        self._refs = {
            engine: vae_pb2.ModelRef(name=engine.card.name, version=engine.card.version, digest=engine.card.digest)
            for engine in repository.engines
        }
        self._repository = repository

    def served(self) -> list[tuple[Engine, vae_pb2.Serving]]:
        """Return the engines and how they run, from the moment they are open, through a drain to the end."""
        return [(engine, model.serving) for engine, model in self._models.items()]

    def drain(self) -> None:
        """Refuse calls from now on; those that are in go on."""
        self._repository = None
        self._refusal = "the server is shutting down; try another one"

    def retry_encode_s(self) -> float | None:
        """Return when to come again if no Encode can be taken now, whatever it holds; None if one may be."""
        return self._retry_after_s(ENCODER)

    def retry_decode_s(self) -> float | None:
        """Return the same of Decode and Sample, which both end in the decoder."""
        return self._retry_after_s(DECODER)

    def retry_any_s(self) -> float | None:
        """Return the same of a call that may be any of them."""
        encode_s, decode_s = self.retry_encode_s(), self.retry_decode_s()
        return None if encode_s is None or decode_s is None else min(encode_s, decode_s)

    async def encode(self, request: vae_pb2.EncodeRequest, deadline: float) -> vae_pb2.EncodeResponse:
        """Images -> posterior mean and standard deviation, and latents where they are wanted."""
        engine = self._engine(request.model)
        images, ref = _array(request, "images"), self._refs[engine]
        draw = _noise(request) if request.want_latents else None
        mean, stddev, *latents = await engine.encode(images, draw, deadline)
        response = vae_pb2.EncodeResponse(model=ref)
        tensors.write_tensor(mean, response.mean)
        tensors.write_tensor(stddev, response.stddev)
        if draw is not None:
            tensors.write_tensor(latents[0], response.latents)
            response.seed = draw.seed
        return response

    async def decode(self, request: vae_pb2.DecodeRequest, deadline: float) -> vae_pb2.DecodeResponse:
        """Latents -> images."""
        engine = self._engine(request.model)
        ref = self._refs[engine]
        images = await engine.decode(_array(request, "latents"), _image_dtype(request), deadline)
        response = vae_pb2.DecodeResponse(model=ref)
        tensors.write_tensor(images, response.images)
        return response

    async def sample(self, request: vae_pb2.SampleRequest, deadline: float) -> vae_pb2.SampleResponse:
        """Draws from the prior -> images."""
        engine = self._engine(request.model)
        ref = self._refs[engine]
        if request.prior not in _FITTED_PRIOR:
            raise InvalidInputError("prior", f"prior {request.prior} is not one of {', '.join(vae_pb2.Prior.keys())}")
        draw = _noise(request)
        images, latents = await engine.sample(
            request.count,
            draw,
            _image_dtype(request),
            temperature=request.temperature if request.HasField("temperature") else 1.0,
            fitted_prior=_FITTED_PRIOR[request.prior],
            deadline=deadline,
        )
        response = vae_pb2.SampleResponse(model=ref, seed=draw.seed)
        tensors.write_tensor(images, response.images)
        if request.want_latents:
            tensors.write_tensor(latents, response.latents)
        return response

    async def get_model(self, request: vae_pb2.GetModelRequest, deadline: float) -> vae_pb2.GetModelResponse:
        """One model's card, and how it runs here."""
        return self._models[self._engine(request.model)]

    async def list_models(self, request: vae_pb2.ListModelsRequest, deadline: float) -> vae_pb2.ListModelsResponse:
        """Every served version, by name, newest first."""
        return vae_pb2.ListModelsResponse(models=[self._models[engine] for engine in self.repository().engines])

    def repository(self) -> Repository:
        """Return what is served now; NotServingError while that is nothing."""
        if self._repository is None:
            raise NotServingError(self._refusal)
        return self._repository

    def _retry_after_s(self, role: int) -> float | None:
        retries_s = []
        for engine in self._repository.engines if self._repository else ():
            queue = engine.full_queue(role)
            if queue is None:  # as is nearly always so: every call asks
                return None
            retries_s.append(queue.retry_after_s())
        return min(retries_s, default=None)

    def _engine(self, model: vae_pb2.ModelRef) -> Engine:
        return self.repository().resolve(model.name, model.version, model.digest)


def _describe(engine: Engine, runtime: Runtime) -> vae_pb2.GetModelResponse:
    serving = vae_pb2.Serving(
        provider=engine.provider,
        requested_device=runtime.requested_device,
        fell_back_to_cpu=runtime.fell_back_to_cpu,
        max_rows_per_call=engine.max_rows_per_call,
        precision=_PRECISIONS[runtime.precision],
    )
    return vae_pb2.GetModelResponse(card=engine.card, serving=serving)


def _array(request: vae_pb2.EncodeRequest | vae_pb2.DecodeRequest, field: str) -> NDArray[np.generic]:
    if not request.HasField(field):
        raise InvalidInputError(field, f"{field} are missing")
    try:
        return tensors.from_tensor(getattr(request, field))
    except tensors.TensorError as error:
        raise InvalidInputError(f"{field}.{error.field}", f"{field}: {error}") from None


def _noise(request: vae_pb2.EncodeRequest | vae_pb2.SampleRequest) -> Noise:
    return Noise(request.seed if request.HasField("seed") else draw_seed(), request.first_row)


def _image_dtype(request: vae_pb2.DecodeRequest | vae_pb2.SampleRequest) -> np.dtype[np.generic]:
    if request.image_dtype == vae_pb2.DATA_TYPE_UNSPECIFIED:
        return _FLOAT32
    try:
        return tensors.numpy_dtype(request.image_dtype)
    except tensors.TensorError as error:
        raise InvalidInputError("image_dtype", f"image_dtype: {error}") from None

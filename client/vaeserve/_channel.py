"""Channels and what is said on them besides the verbs: the one place where settings meet gRPC."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from vaeserve._settings import SERVICE, TLS, ChannelSettings
from vaeserve.v1 import vae_pb2_grpc

HEALTH_REQUEST = health_pb2.HealthCheckRequest(service=SERVICE)
SERVING = health_pb2.HealthCheckResponse.SERVING
WATCH_AGAIN_S = 0.05  # pause before a health watch that ended is begun again


def open_blocking(settings: ChannelSettings) -> grpc.Channel:
    """Return a channel for the blocking client; it connects when it is first used."""
    if settings.tls:
        return grpc.secure_channel(settings.target, _credentials(settings.tls), settings.channel_options())
    return grpc.insecure_channel(settings.target, settings.channel_options())


def open_asyncio(settings: ChannelSettings) -> grpc.aio.Channel:
    """Return a channel for the asyncio client, bound to the running event loop."""
    if settings.tls:
        return grpc.aio.secure_channel(settings.target, _credentials(settings.tls), settings.channel_options())
    return grpc.aio.insecure_channel(settings.target, settings.channel_options())


def stub(channel: grpc.Channel | grpc.aio.Channel) -> vae_pb2_grpc.VaeServiceStub:
    """Return the service's stub; its methods are blocking or awaitable as the channel is."""
    return vae_pb2_grpc.VaeServiceStub(channel)  # type: ignore[no-untyped-call]  # generated


def status_name(answer: health_pb2.HealthCheckResponse) -> str:
    """Return what the standard health service said, in its own word."""
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    """Return gRPC's form of TLS; OSError names a file that cannot be read."""
    return grpc.ssl_channel_credentials(
        root_certificates=_read_pem(tls.root_certificates),
        private_key=_read_pem(tls.private_key),
        certificate_chain=_read_pem(tls.certificate_chain),
    )


def _read_pem(given: str | Path | bytes | None) -> bytes | None:
    return given if given is None or isinstance(given, bytes) else Path(given).read_bytes()

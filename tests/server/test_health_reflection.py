"""The standard health and reflection services, with their stock clients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serving import RunningServer, running_server
from vaeserve_server.app import Server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
VAE_SERVICE = "vaeserve.v1.VaeService"


def check(channel: grpc.Channel, service: str) -> int:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status


@pytest.mark.parametrize("service", ["", VAE_SERVICE])
def test_a_loaded_server_is_serving(channel: grpc.Channel, service: str) -> None:
    assert check(channel, service) == SERVING


def test_an_unknown_service_is_not_found(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError, match="there is no service 'nothing'") as raised:
        check(channel, "nothing")
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


def test_watchers_hear_of_the_end_whoever_else_left_before(several_models: Path) -> None:
    with ThreadPoolExecutor() as pool:
        # The delay keeps the news and the end apart: grpcio's client drops what it has not read when a stream ends.
        with running_server(several_models, drain_delay_s=0.5) as server:
            channel = grpc.insecure_channel(server.target)
            watch = health_pb2_grpc.HealthStub(channel).Watch
            streams = [watch(health_pb2.HealthCheckRequest(service=name)) for name in (VAE_SERVICE, "", "nothing")]
            leaving = watch(health_pb2.HealthCheckRequest(service=VAE_SERVICE))
            assert [next(stream).status for stream in [*streams, leaving]] == [
                SERVING,
                SERVING,
                SERVICE_UNKNOWN,
                SERVING,
            ]
            leaving.cancel()
            rest = [pool.submit(list, stream) for stream in streams]
        # The server has drained: every stream was told, and ended.
        assert [[response.status for response in told.result()] for told in rest] == [[NOT_SERVING], [NOT_SERVING], []]
        channel.close()


@pytest.mark.in_process
def test_while_models_load_health_says_so_and_calls_are_unavailable(
    several_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    load = Server._load

    async def look_and_load(server: Server) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            seen.append((await health.Check(health_pb2.HealthCheckRequest(service=VAE_SERVICE))).status)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await channel.unary_unary(f"/{VAE_SERVICE}/ListModels")(b"")
            seen.append((raised.value.code(), raised.value.details()))
        await load(server)

    monkeypatch.setattr(Server, "_load", look_and_load)
    with running_server(several_models) as server, grpc.insecure_channel(server.target) as channel:
        assert check(channel, VAE_SERVICE) == SERVING
    assert seen == [NOT_SERVING, (grpc.StatusCode.UNAVAILABLE, "the server is loading its models; try again")]


def test_reflection_describes_the_contract(server: RunningServer) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=VAE_SERVICE),
    ]
    with grpc.insecure_channel(server.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        services, files = stub.ServerReflectionInfo(iter(requests))
    assert {service.name for service in services.list_services_response.service} == {
        VAE_SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    described = [
        descriptor_pb2.FileDescriptorProto.FromString(file)
        for file in files.file_descriptor_response.file_descriptor_proto
    ]
    (contract,) = (file for file in described if file.name == "vaeserve/v1/vae.proto")
    assert [method.name for method in contract.service[0].method] == [
        "Encode",
        "Decode",
        "Sample",
        "GetModel",
        "ListModels",
    ]

"""Messages that would be large if they were believed: refused before they cost memory, on both transports."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

import serving
from http2 import CLOSED, Connection, frame
from served import Served, has_envoy
from vaeserve.v1 import vae_pb2 as pb

LIST_MODELS = "/vaeserve.v1.VaeService/ListModels"
ENCODE = "/vaeserve.v1.VaeService/Encode"
HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
REFUSED = {str(code.value[0]) for code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)}
EXHAUSTED = str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
LIMIT_MIB = 32  # the default of --max-message-bytes
GIB = 2**30

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
    pytest.mark.skipif(serving.default_transport != "grpc", reason="takes both transports by itself"),
]


@pytest.fixture(scope="module", params=["grpc", "envoy"])
def served(request: pytest.FixtureRequest, several_models: Path) -> Iterator[Served]:
    if request.param == "envoy" and not has_envoy():
        pytest.skip("pyvoy is not installed")
    with Served(several_models, request.param, threads=1) as running:
        with Connection(running.target) as connection:  # a message of the limit, so that its buffers are there
            stream = connection.open(LIST_MODELS, grpc_encoding="gzip")
            connection.send_all(stream, frame(zeros(LIMIT_MIB * 2**20), 1))
            connection.outcome(stream)
        yield running


def zeros(count: int) -> bytes:
    """Return gzip data that unpacks to `count` zeros, all but its checksum."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    start = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)  # depends on nothing before it
    return start + block * (count // 2**20)


@pytest.mark.parametrize("path", [LIST_MODELS, HEALTH])
def test_a_gibibyte_of_zeros_in_a_megabyte_of_gzip_is_not_unpacked(served: Served, path: str) -> None:
    before = served.peak_mib()
    bomb = frame(zeros(GIB), 1)
    assert len(bomb) < 2 * 2**20
    with Connection(served.target) as connection:
        for _ in range(3):
            stream = connection.open(path, grpc_encoding="gzip")
            connection.send_all(stream, bomb)
            assert connection.outcome(stream) == EXHAUSTED
            assert connection.call(LIST_MODELS, frame(b"")) == "0"
    assert served.peak_mib() - before < 3 * LIMIT_MIB


@pytest.mark.parametrize("length", [2**31 - 1, 2**31, 2**32 - 1])
def test_a_claim_of_gibibytes_is_not_believed(served: Served, length: int) -> None:
    before = served.peak_mib()
    with Connection(served.target) as connection, Connection(served.target) as other:
        for _ in range(50):
            connection.send(connection.open(LIST_MODELS), frame(b"a few bytes of it", length=length), end=False)
        assert other.call(LIST_MODELS, frame(b"")) == "0"
    assert served.peak_mib() - before < LIMIT_MIB


def test_messages_after_the_only_one_are_not_kept(served: Served) -> None:
    before = served.peak_mib()
    with Connection(served.target) as connection, Connection(served.target) as other:
        stream = connection.open(LIST_MODELS)
        with contextlib.suppress(ConnectionError):  # grpcio closes the connection
            connection.send_all(stream, frame(b"\xff" * 2**20) * 60)
            assert connection.outcome(stream) in {*REFUSED, CLOSED}
        assert other.call(LIST_MODELS, frame(b"")) == "0"
    assert served.peak_mib() - before < LIMIT_MIB


@pytest.mark.parametrize(
    ("path", "request_of"),
    [
        (LIST_MODELS, lambda text: b"\xff" + text.encode()),
        (ENCODE, lambda text: pb.EncodeRequest(model=pb.ModelRef(name=text)).SerializeToString()),
        (HEALTH, lambda text: b"\xff" + text.encode()),
        (REFLECTION, lambda text: b"\xff" + text.encode()),
        (HEALTH, lambda text: health_pb2.HealthCheckRequest(service=text).SerializeToString()),
    ],
)
def test_large_requests_that_are_refused_are_not_kept(
    served: Served, path: str, request_of: Callable[[str], bytes]
) -> None:
    request = request_of("x" * (20 * 2**20))
    before = served.peak_mib()
    with grpc.insecure_channel(served.target) as channel:
        call = channel.unary_unary(path, None, None)
        for _ in range(10):
            with pytest.raises(grpc.RpcError):
                call(request)
    assert served.peak_mib() - before < 4 * LIMIT_MIB

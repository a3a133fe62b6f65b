"""A short run of `make fuzz`: hostile requests to every RPC on both transports, which must answer them alike."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

import serving
from fuzzing import MALFORMED, WELL_FORMED, Case, FuzzError, Rpc, Tally, fuzz, memory, outcome, serve, table
from served import has_envoy

CASES = 1200

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
    pytest.mark.skipif(serving.default_transport != "grpc", reason="takes both transports by itself"),
]


def run(models: Path, transport: str) -> Tally:
    with serve(models, transport) as served:
        return fuzz(served, models, CASES)


def seedless(tally: Tally) -> dict[tuple[str, str, grpc.StatusCode], int]:
    """Return what does not depend on the seed that a server draws: a wild temperature may overflow or not."""
    return {key: number for key, number in tally.statuses.items() if not key[0].endswith(("/Sample", "/ModelInfer"))}


def test_no_request_finds_a_fault_and_both_transports_say_the_same(several_models: Path) -> None:
    tally = run(several_models, "grpc")
    assert tally.cases >= CASES
    assert {path.rpartition("/")[2] for path, _, _ in tally.statuses} >= {
        "Encode",
        "Decode",
        "Sample",
        "GetModel",
        "ListModels",
        "Check",
        "Watch",
        "ServerReflectionInfo",
    }
    for kind in (WELL_FORMED, MALFORMED):  # some get through, or the walk would stay at the door
        codes = {code for path, of_kind, code in tally.statuses if of_kind == kind and path.endswith("/Encode")}
        assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= codes, table(tally)
    before, after = memory(tally)
    assert 0 < after < 1.5 * before
    if has_envoy():
        assert seedless(run(several_models, "envoy")) == seedless(tally)


@pytest.mark.parametrize("payload", [b"", b"\xff\xff"])
def test_a_server_that_fails_is_found_out(payload: bytes) -> None:
    def fail(request: bytes, _context: grpc.ServicerContext) -> bytes:
        return health_pb2.HealthCheckRequest.FromString(request).no_such_field  # type: ignore[attr-defined]

    handler = grpc.method_handlers_generic_handler("a.Service", {"Method": grpc.unary_unary_rpc_method_handler(fail)})
    server = grpc.server(ThreadPoolExecutor(1), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    rpc = Rpc("/a.Service/Method", [health_pb2.HealthCheckRequest()], False, False)
    try:
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
            pytest.raises(FuzzError, match=f"UNKNOWN.*plain: {payload.hex()}"),
        ):
            outcome(channel, Case(rpc, MALFORMED, payload, compressed=False))
    finally:
        server.stop(None).wait()

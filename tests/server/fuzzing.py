"""Throw hostile requests at a server and hold it to its promise: a status that blames the caller, and life goes on.

What may be called, and with what messages, is learnt from the server's own reflection, so that no RPC is forgotten.
"""

from __future__ import annotations

import importlib.util
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bundles import DECODER, ENCODER, run_directly
from good_requests import good_requests
from hostile import messages, mutated
from reflection_client import ReflectionClient
from served import Served
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server.noise import standard_normal

# What a request may be answered with. Not UNKNOWN, INTERNAL or UNAVAILABLE: faults; nor DEADLINE_EXCEEDED: a hang.
BLAMES_THE_CALLER = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.OUT_OF_RANGE,
}
WELL_FORMED, MALFORMED = "well-formed", "malformed"
_TIMEOUT_S = 60.0
_IN_FLIGHT = 64
_MUTANTS = 3  # of each message
# glibc keeps large blocks that were freed, more of them after each burst of large messages: 25 MiB until it has enough.
# Here it gives them back, so that what grows is the server's.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
_SHARES = 5  # of an RPC whose good requests are known; there is little to be found in the others


class FuzzError(AssertionError):
    """The server broke its promise. The message has the request."""


@dataclass(frozen=True)
class Rpc:
    """One method of a served service; `examples` are good requests of it."""

    path: str
    examples: list[Message]
    request_streaming: bool
    response_streaming: bool


class Case(NamedTuple):
    """One request: bytes for a method."""

    rpc: Rpc
    kind: str
    payload: bytes
    compressed: bool


@dataclass
class Tally:
    """What came of the cases: by method, kind and status; and the server's memory along the way."""

    statuses: Counter[tuple[str, str, grpc.StatusCode]] = field(default_factory=Counter)
    resident_mib: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return sum(self.statuses.values())


def serve(models: Path, transport: str) -> Served:
    """Return a server to be fuzzed, with all that it can offer."""
    oip = importlib.util.find_spec("tritonclient") is not None
    return Served(models, transport, variables=_MALLOC, max_rows_per_call=100, threads=1, oip=oip)


def discover(channel: grpc.Channel) -> list[Rpc]:
    """Return every method that the server's reflection tells of."""
    client = ReflectionClient(channel)
    return [
        Rpc(
            f"/{service}/{method.name}",
            good_requests(method.input_type),
            method.client_streaming,
            method.server_streaming,
        )
        for service in client.services()
        for method in client.describe(service).methods
    ]


def cases(rpcs: list[Rpc]) -> st.SearchStrategy[list[Case]]:
    """Return a well-formed request of one of the methods, and mutants of it."""

    def build(rpc: Rpc, message: Message, number: int) -> list[Case]:
        data, source = message.SerializeToString(), random.Random(number)
        mutants = [mutated(data, source) for _ in range(_MUTANTS)]
        compressed = number % 8 == 0
        return [Case(rpc, WELL_FORMED, data, compressed), *(Case(rpc, MALFORMED, each, compressed) for each in mutants)]

    numbers = st.integers(0, 2**32 - 1)
    rpcs = [rpc for rpc in rpcs for _ in range(1 if rpc.examples[0] == type(rpc.examples[0])() else _SHARES)]
    return st.one_of([st.builds(build, st.just(rpc), messages(rpc.examples), numbers) for rpc in rpcs])


def fuzz(served: Served, models: Path, count: int, *, first_seed: int = 0, say: Callable[[str], None] = str) -> Tally:
    """Send `count` cases, with a good call now and then that must be answered rightly; FuzzError at the first fault."""
    tally, started = Tally(), time.perf_counter()
    with served.channel() as channel:
        rpcs = discover(channel)
        good = GoodCalls(vae_pb2_grpc.VaeServiceStub(channel), models)
        number = first_seed
        while tally.cases < count:
            # Hypothesis keeps all that it has drawn in one run, so many short runs.
            batch = _drawn(cases(rpcs), min(500, -(-(count - tally.cases) // (1 + _MUTANTS))), number)
            for group in _chunks(batch, 1000):
                send_all(channel, group, tally)
                good.check()
                if not served.is_alive():
                    raise FuzzError(f"the server died; seed {number}\n{served.log()[-2000:]}")
                tally.resident_mib.append(served.resident_mib())
            number += 1
            say(f"{tally.cases} cases, {tally.resident_mib[-1]:.0f} MiB")
    tally.seconds = time.perf_counter() - started
    return tally


def send_all(channel: grpc.Channel, group: Iterable[Case], tally: Tally) -> None:
    """Send the cases, many at once, and count what they come to."""
    waiting: list[tuple[Case, Any]] = []
    for case in group:
        waiting.append((case, _start(channel, case)))
        if len(waiting) == _IN_FLIGHT:
            _settle(waiting, tally)
    _settle(waiting, tally)


def outcome(channel: grpc.Channel, case: Case) -> grpc.StatusCode:
    """Send one case and return its status."""
    return _code(case, _start(channel, case))


class GoodCalls:
    """Calls whose answers are known: those of the bundles' graphs, run with nothing of the server between."""

    def __init__(self, stub: vae_pb2_grpc.VaeServiceStub, models: Path) -> None:
        self._stub = stub
        self._folder = models / "mnist" / "2"
        source = np.random.default_rng(0)
        self._images = source.random((3, 1, 28, 28), np.float32)
        self._latents = source.standard_normal((3, 4), np.float32)
        mean, stddev = run_directly(self._folder, ENCODER, self._images)
        (decoded,) = run_directly(self._folder, DECODER, self._latents)
        (sampled,) = run_directly(self._folder, DECODER, standard_normal(7, 0, 3, 4))
        self._expected = [mean, stddev, decoded, sampled]

    def check(self) -> None:
        """Make them; FuzzError if one fails or another answer comes."""
        model = pb.ModelRef(name="mnist")
        try:
            encoded = self._stub.Encode(pb.EncodeRequest(model=model, images=tensors.to_tensor(self._images)))
            decoded = self._stub.Decode(pb.DecodeRequest(model=model, latents=tensors.to_tensor(self._latents)))
            sampled = self._stub.Sample(pb.SampleRequest(model=model, count=3, seed=7))
        except grpc.RpcError as error:
            raise FuzzError(f"a good call failed: {error}") from None
        answers = [encoded.mean, encoded.stddev, decoded.images, sampled.images]
        for given_answer, expected in zip(answers, self._expected, strict=True):
            if not np.allclose(tensors.from_tensor(given_answer), expected, rtol=1e-5, atol=1e-6):
                raise FuzzError("a good call was answered wrongly")


def table(tally: Tally) -> str:
    """Return the tally for people."""
    lines = [f"{'cases':>9}  {'method':<66}{'kind':<13}statuses"]
    methods: dict[tuple[str, str], Counter[str]] = {}
    for (path, kind, code), number in tally.statuses.items():
        methods.setdefault((path, kind), Counter())[code.name] += number
    for (path, kind), codes in sorted(methods.items()):
        words = ", ".join(f"{name} {number}" for name, number in codes.most_common())
        lines.append(f"{sum(codes.values()):>9}  {path:<66}{kind:<13}{words}")
    before, after = memory(tally)
    lines.append(
        f"{tally.cases:>9}  in {tally.seconds:.0f} s, {tally.cases / tally.seconds:.0f} calls/s; "
        f"memory {before:.0f} MiB in the first quarter, {after:.0f} MiB in the last"
    )
    return "\n".join(lines)


def memory(tally: Tally) -> tuple[float, float]:
    """Return the server's median memory in the first quarter, its first few samples apart, and in the last, MiB."""
    sizes = tally.resident_mib[min(5, len(tally.resident_mib) // 8) :]
    quarter = max(1, len(sizes) // 4)
    return float(np.median(sizes[:quarter])), float(np.median(sizes[-quarter:]))


def _drawn(strategy: st.SearchStrategy[list[Case]], examples: int, number: int) -> list[Case]:
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(drawn: list[Case]) -> None:
        found.extend(drawn)

    collect()
    return found


def _chunks(batch: list[Case], size: int) -> Iterator[list[Case]]:
    for first in range(0, len(batch), size):
        yield batch[first : first + size]


def _start(channel: grpc.Channel, case: Case) -> Any:
    """Start a call of raw bytes; what it returns is for `_code`."""
    compression = grpc.Compression.Gzip if case.compressed else None
    options: dict[str, Any] = {"timeout": _TIMEOUT_S, "compression": compression}
    if case.rpc.request_streaming:
        return channel.stream_stream(case.rpc.path)(iter([case.payload]), **options)
    if case.rpc.response_streaming:
        return channel.unary_stream(case.rpc.path)(case.payload, **options)
    return channel.unary_unary(case.rpc.path).future(case.payload, **options)


def _code(case: Case, call: Any) -> grpc.StatusCode:
    if case.rpc.response_streaming:
        try:
            next(call, None)  # a watch never ends by itself
        except grpc.RpcError:
            pass
        else:
            call.cancel()
            return grpc.StatusCode.OK
    code: grpc.StatusCode = call.code()
    if code not in BLAMES_THE_CALLER:
        raise FuzzError(
            f"{case.rpc.path} answered {code.name} ({call.details()}) to a {case.kind} request of {len(case.payload)} "
            f"bytes, {'compressed' if case.compressed else 'plain'}: {case.payload[:2000].hex()}"
        )
    return code


def _settle(waiting: list[tuple[Case, Any]], tally: Tally) -> None:
    for case, call in waiting:
        tally.statuses[case.rpc.path, case.kind, _code(case, call)] += 1
    waiting.clear()

"""The test bed: one model, and the processes that serve, imitate, call and drive it, each started when needed."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

import h2load
import traffic
from children import HERE, BenchError, Child, cpu_s, worker
from traffic import SERVICE, VERBS, Model, Verb
from vaeserve.v1 import vae_pb2
from vaeserve_server.cores import available_cores

GRPC, ENVOY, ECHO, ENVOY_ECHO = "grpc", "envoy", "echo", "envoy echo"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0)]
_CALL_S = 60.0
# Of calls that only show how many fill the time; of large calls a few do, or the probe is longer than what it is for.
_PROBE_ROWS = 64
_PROBE_CALLS = 16
_CALLS = re.compile(r'^vaeserve_calls_total\{.*?code="(\w+)".*?\} (\S+)$', re.MULTILINE)


class Effort(NamedTuple):
    """How long to measure: `seconds` a value, in so many rounds; and the length of the long iterator."""

    seconds: float
    rounds: int
    stream_rows: int


@dataclass(frozen=True)
class Server:
    """A server under test, or the echo."""

    transport: str
    port: int
    child: Child
    channel: grpc.Channel
    metrics_port: int = 0

    @property
    def target(self) -> str:
        """Where it is, for the SDK."""
        return f"127.0.0.1:{self.port}"

    def call(self, method: str, request: bytes) -> bytes:
        """Make one call by grpcio; BenchError with its status if it fails."""
        try:
            answer: bytes = self.channel.unary_unary(f"/{SERVICE}/{method}", None, None)(request, timeout=_CALL_S)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            raise BenchError(f"{method} over {self.transport} failed: {error.code().name}: {error.details()}") from None
        return answer

    def ended_calls(self) -> dict[str, int] | None:
        """Return how many calls the server itself has counted, by status code; None if it counts none, as the echo."""
        if not self.metrics_port:
            return None
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=_CALL_S) as page:
            found = _CALLS.findall(page.read().decode())
        codes = {code for code, _ in found}
        return {code: sum(round(float(count)) for each, count in found if each == code) for code in codes}


class Sent(NamedTuple):
    """A request as the load generators take it, and the length of its framed answer."""

    path: str
    body_file: Path
    answer_bytes: int


class Bed:
    """Everything that workloads measure with. Figures that cannot be had are noted in `skipped`, with the reason."""

    def __init__(self, model: Model, models: Path, folder: Path, device: str, effort: Effort) -> None:
        self.model = model
        self.effort = effort
        self.device = device
        self.skipped: dict[str, str] = {}
        # By graph: the best setting of ONNX Runtime alone for each batch size, and the best batch size.
        self.best_alone: dict[str, dict[int, str]] = {}
        self.best_batch: dict[str, int] = {}
        self._models = models
        self._folder = folder
        self._stack = ExitStack()
        self._requests: dict[tuple[str, int], Path] = {}
        self._of_workers: dict[int, Server] = {}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._load_core = cores[-1] if len(cores) > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def load_core(self) -> list[str]:
        """The core that load generators keep to, as an argument for one; none where there is only one."""
        return [] if self._load_core is None else [str(self._load_core)]

    @cached_property
    def servers(self) -> list[Server]:
        """One server for each transport that there is."""
        found = [self.serve(GRPC)]
        if importlib.util.find_spec("pyvoy") is None:
            self.skipped["transport envoy"] = 'it is not installed; pip install "vaeserve[envoy]"'
            return found
        try:
            return [*found, self.serve(ENVOY)]
        except BenchError as error:
            self.skipped["transport envoy"] = str(error)
            return found

    @cached_property
    def echo(self) -> Server:
        """A bare grpcio server that gives our answers to requests of one row."""
        child = self._stack.enter_context(worker("echo_server.py", self._folder / "echo.log"))
        return self._server(ECHO, child, child.ask(**self._recorded)["port"])

    @cached_property
    def echoes(self) -> list[Server]:
        """The bare grpcio echo, and where Envoy is a bare echo in it: the same bytes, nothing computed."""
        if self.servers[-1].transport != ENVOY:
            return [self.echo]
        answers = self._folder / "answers.json"
        answers.write_text(json.dumps(self._recorded))
        command = [sys.executable, str(HERE / "envoy_echo.py"), str(answers), *self._flags(ENVOY)]
        child = self._stack.enter_context(Child(command, self._folder / "envoy-echo.log"))
        return [self.echo, self._server(ENVOY_ECHO, child, port_of(child.line()))]

    @cached_property
    def _recorded(self) -> dict[str, str]:
        """Our answers to requests of one row, in base64, by method."""
        ours = self.servers[0]
        answers = {"GetModel": ours.call("GetModel", b"")}
        answers |= {verb.method: ours.call(verb.method, self._request(verb, 1).read_bytes()[5:]) for verb in VERBS}
        return {method: base64.b64encode(answer).decode() for method, answer in answers.items()}

    @cached_property
    def onnxruntime(self) -> Child:
        """ONNX Runtime alone on the same graphs."""
        log = self._folder / "onnxruntime.log"
        arguments = [str(self.model.folder), _PROVIDERS[self.device], str(available_cores())]
        return self._stack.enter_context(worker("onnxruntime_alone.py", log, *arguments))

    @cached_property
    def sdk(self) -> Child:
        """A program that uses the SDK."""
        return self._stack.enter_context(self.new_sdk())

    @cached_property
    def max_rows(self) -> int:
        """The most rows that one call may carry."""
        answer = vae_pb2.GetModelResponse.FromString(self.servers[0].call("GetModel", b""))
        return answer.serving.max_rows_per_call

    def new_sdk(self) -> Child:
        """Start another such program, with fresh memory; the caller's to stop."""
        return worker("sdk_worker.py", self._folder / "sdk.log")

    def workers(self, count: int) -> Server:
        """Return a server of `count` processes."""
        if count not in self._of_workers:
            self._of_workers[count] = self.serve(GRPC, f"--workers={count}")
        return self._of_workers[count]

    def serve(self, transport: str, *flags: str) -> Server:
        """Start a server and return it once it is ready; it runs until the end."""
        metrics_port = _free_port()
        child = self._stack.enter_context(self.new_server(transport, f"--metrics-port={metrics_port}", *flags))
        return self._server(transport, child, port_of(child.line()), metrics_port)

    def new_server(self, transport: str, *flags: str) -> Child:
        """Start a server that is not ready yet; the caller's to stop."""
        command = [sys.executable, "-m", "vaeserve_server", *self._flags(transport), *flags]
        return Child(command, self._folder / f"server-{transport}.log")

    def _flags(self, transport: str) -> list[str]:
        return [
            *(f"--models={self._models}", "--port=0", "--metrics-port=0", "--log-level=warning"),
            *(f"--device={self.device}", f"--transport={transport}"),
        ]

    def first_answer_s(self, transport: str) -> float:
        """Return the time from a server's start to its first answer."""
        began = time.perf_counter()
        with self.new_server(transport) as child, self._channel(port_of(child.line())) as channel:
            verb = VERBS[0]
            Server(transport, 0, child, channel).call(verb.method, self._request(verb, 1).read_bytes()[5:])
            return time.perf_counter() - began

    def verified(self, server: Server, verb: Verb, rows: int) -> Sent:
        """Make one call and check its answer; return what the load generators need to make many."""
        body_file = self._request(verb, rows)
        answer = server.call(verb.method, body_file.read_bytes()[5:])
        traffic.check(verb, self.model, rows, answer)
        return Sent(verb.path, body_file, len(traffic.framed(answer)))

    def closed_loop(
        self, server: Server, verb: Verb, rows: int, in_flight: int, *, connections: int = 1, share: float = 1.0
    ) -> dict[str, float]:
        """Return calls_per_s with `in_flight` calls under way, for `share` of the time that a value takes.

        And the generator's cpu_share, and server_us: processor time of the server for each call.
        """
        sent = self.verified(server, verb, rows)
        probe_calls = max(_PROBE_ROWS // rows, _PROBE_CALLS, 2 * in_flight)
        probe = self._drive(server, sent, in_flight, connections, probe_calls)
        calls = max(in_flight, round(probe["calls_per_s"] * self.effort.seconds * share))
        began_s = cpu_s(server.child.pid)
        with self._counted(server, calls):
            got = self._drive(server, sent, in_flight, connections, calls)
        return got | {"server_us": 1e6 * (cpu_s(server.child.pid) - began_s) / calls}

    def open_loop(self, server: Server, verb: Verb, calls_per_s: float, seed: int) -> dict[str, float]:
        """Return the times in ms (p50, p99, p99.9) of calls that arrive at random, `calls_per_s` on average."""
        sent = self.verified(server, verb, 1)
        calls = round(calls_per_s * 2 * self.effort.seconds)
        with self._counted(server, calls):
            answer: dict[str, float] = self._http2_load.ask(
                do="open",
                port=server.port,
                path=sent.path,
                body_file=str(sent.body_file),
                answer_bytes=sent.answer_bytes,
                calls_per_s=calls_per_s,
                calls=calls,
                seed=seed,
            )
        return answer

    @contextmanager
    def _counted(self, server: Server, calls: int) -> Iterator[None]:
        """Raise BenchError unless the server itself counts just so many calls meanwhile, all of them answered."""
        before = server.ended_calls()
        yield
        after = server.ended_calls()
        if before is None or after is None:
            return
        counted = {code: count - before.get(code, 0) for code, count in after.items() if count != before.get(code, 0)}
        if counted != {"OK": calls}:
            raise BenchError(f"{calls} calls were made over {server.transport}; the server counted {counted}")

    def ask_sdk(self, do: str, server: Server, verb: Verb, **arguments: Any) -> dict[str, float]:
        """Have the SDK do something with a verb."""
        answer: dict[str, float] = self.sdk.ask(
            do=do,
            target=server.target,
            server_pid=server.child.pid,
            bundle=str(self.model.folder),
            verb=verb.name,
            seconds=self.effort.seconds,
            **arguments,
        )
        return answer

    def bare_call_us(self, server: Server, verb: Verb) -> float:
        """Return the time of one blocking call of one row by grpcio without the SDK."""
        answer: dict[str, float] = self.sdk.ask(
            do="bare_one_at_a_time",
            target=server.target,
            server_pid=server.child.pid,
            path=verb.path,
            body_file=str(self._request(verb, 1)),
            seconds=self.effort.seconds,
        )
        return 1e6 / answer["calls_per_s"]

    @cached_property
    def _http2_load(self) -> Child:
        return self._stack.enter_context(worker("http2_load.py", self._folder / "http2_load.log", *self.load_core))

    def _drive(self, server: Server, sent: Sent, in_flight: int, connections: int, calls: int) -> dict[str, float]:
        arguments: dict[str, Any] = {
            "port": server.port,
            "path": sent.path,
            "body_file": str(sent.body_file),
            "answer_bytes": sent.answer_bytes,
            "in_flight": in_flight,
            "connections": connections,
            "calls": calls,
        }
        if h2load.find():
            return h2load.closed_loop(**arguments, core=self._load_core)
        answer: dict[str, float] = self._http2_load.ask(do="closed", **arguments)
        return answer

    def _request(self, verb: Verb, rows: int) -> Path:
        """Return the file that has a framed request of so many rows."""
        key = (verb.name, rows)
        if key not in self._requests:
            self._requests[key] = path = self._folder / f"{verb.name}-{rows}.bin"
            path.write_bytes(traffic.framed(verb.request(self.model, rows).SerializeToString()))
        return self._requests[key]

    def _server(self, transport: str, child: Child, port: int, metrics_port: int = 0) -> Server:
        return Server(transport, port, child, self._stack.enter_context(self._channel(port)), metrics_port)

    @staticmethod
    def _channel(port: int) -> grpc.Channel:
        return grpc.insecure_channel(f"127.0.0.1:{port}", _CHANNEL_OPTIONS)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def port_of(ready_line: str) -> int:
    """Return the port that a server's ready line names."""
    found = re.search(r":(\d+) ", ready_line)
    if not found:
        raise BenchError(f"the server's first line names no port: {ready_line!r}")
    return int(found[1])

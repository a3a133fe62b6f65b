"""Flags and VAESERVE_* variables -> one frozen settings object. A flag wins over its variable."""

from __future__ import annotations

import ipaddress
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, CliImplicitFlag, SettingsConfigDict

from vaeserve_server.bundle import NAME_PATTERN, VERSION_PATTERN, Precision
from vaeserve_server.errors import StartError, shown
from vaeserve_server.logs import LogFormat, LogLevel
from vaeserve_server.models_folder import Key

Device = Literal["auto", "cuda", "cpu"]
Transport = Literal["grpc", "envoy"]
Count = Annotated[int, Field(ge=1)]
CountOrAuto = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_MOST = 1_000_000  # what every transport's numbers hold, in milliseconds too


class Settings(BaseSettings):
    """Serve variational autoencoders over gRPC.

    Every flag is also an environment variable: --drain-s is VAESERVE_DRAIN_S. `vaeserve-server doctor`, with the same
    flags, says what is installed, what works here and how fast, and what to do next.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="VAESERVE_",
        use_attribute_docstrings=True,
        cli_prog_name="vaeserve-server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    models: Path = Path("models")
    """Folder of bundles, models/<name>/<version>/."""
    versions: Count = 2
    """Newest versions of each model to serve. The newest answers a request that names none."""
    pin: str = ""
    """Versions to serve besides the newest, as mnist/3,faces/1."""
    watch_s: Seconds = 2.0
    """How often to look for new, changed and removed versions. 0 looks only at a SIGHUP."""
    try_first: CliImplicitFlag[bool] = False
    """Load and run each version once in a process of its own before it is loaded here: what ONNX Runtime dies of, or
    takes all memory for, is then refused like what is damaged. Costs some seconds, and the model's memory once more."""
    device: Device = "auto"
    """Where graphs run. cuda refuses to start without a working GPU; auto may fall back to the CPU, and says so."""
    precision: Precision = "fp32"
    """What encoders and decoders compute in. fp16 is for GPUs, and for models published with it; the model's card says
    how exact it is."""
    threads: CountOrAuto = 0
    """Runs of graphs at once, shared out evenly among workers. 0 is the whole cores that may be used on a CPU, 1 each
    on a GPU."""
    workers: Count = 1
    """Server processes on the one port. More pay on a CPU where small calls are the load; clients then need several
    connections."""
    tf32: CliImplicitFlag[bool] = False
    """On a GPU: multiply with 10 bits of mantissa. Faster, and less exact than the model's card says."""
    nhwc: CliImplicitFlag[bool] = False
    """On a GPU: run convolutions with channels last. Pays for wide ones; measure it on the model."""
    gpu_memory_bytes: CountOrAuto = 0
    """On a GPU: most memory that each graph's session may take for its arena. 0 is no limit."""
    cuda_graphs: CliImplicitFlag[bool] = False
    """On a GPU: replay each batch size's kernels as one CUDA graph. Pays for small models; one thread a worker."""

    transport: Transport = "grpc"
    """What carries the calls. envoy, an extra of that name, answers up to twice as many small calls a second."""
    oip: CliImplicitFlag[bool] = False
    """Also answer the Open Inference Protocol v2, for Triton's and KServe's clients. Needs the extra oip."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    """Port to listen on; 0 takes a free one."""
    tls_cert: Path | None = None
    """Encrypt: PEM file of this server's certificate, then of those that vouch for it. Goes with tls-key."""
    tls_key: Path | None = None
    """PEM file of its key, not encrypted. These files, and tokens, may be replaced while the server runs."""
    client_ca: Path | None = None
    """Serve only clients with a certificate that one of those in this PEM file vouches for."""
    tokens: Path | None = None
    """Serve only calls with a token of this file, each for its own RPCs; see `vaeserve-server token --help`."""
    open_health: CliImplicitFlag[bool] = True
    """With tokens: answer health checks without one, for load balancers and orchestrators."""
    insecure: CliImplicitFlag[bool] = False
    """Listen on an address that other machines reach although anybody there may call, or may read the tokens."""
    max_message_bytes: Annotated[int, Field(ge=65536, le=2**31 - 1)] = 32 * 2**20
    """Largest message taken. Row limits keep calls at half of it, so that a somewhat larger one is told its limit."""

    max_rows_per_call: Count = 4096
    """Most rows in one call; fewer where the images are so large that max-message-bytes says so."""
    max_batch_rows: CountOrAuto = 0
    """Most rows in one run of a graph. 0 is 128 on a CPU, 256 on a GPU."""
    max_queue_rows: Count = 8192
    """Most rows waiting for each graph; a call beyond is refused at once and told when to try again."""
    max_calls: Annotated[int, Field(ge=1, le=_MOST)] = 1024
    """Most calls in hand at once; one beyond is refused before it is read."""
    watchdog_s: Seconds = 30.0
    """Longest time for one run of a graph. A model with a longer one is not served until it ends; 0 waits for ever."""
    batch_wait_us: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Time that a call may wait for others to share its run, rounded up to whole milliseconds. 0 never waits."""

    max_connections: Annotated[int, Field(ge=0, le=_MOST)] = 0
    """Most connections of each worker. 0 is what the limit of open files allows, at most 16384."""
    idle_s: Annotated[float, Field(ge=0, le=_MOST)] = 300.0
    """Time after which a connection without a call is closed; clients open another when they need it. 0 is never."""
    connection_age_s: Annotated[float, Field(ge=0, le=_MOST)] = 1800.0
    """Time after which a connection is asked to go, so that clients spread anew over servers. 0 is never."""
    keepalive_s: Annotated[float, Field(ge=0, le=_MOST)] = 60.0
    """How often a quiet connection is asked whether anybody is there. Without an answer in as long again, at most 20 s,
    it is closed. 0 is never."""

    metrics: CliImplicitFlag[bool] = True
    """Serve Prometheus metrics over HTTP, at /metrics."""
    metrics_host: str = "127.0.0.1"
    """Address for them. They are never encrypted and ask nobody who is calling; they tell of load, not of images."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9464
    """Port for them, one page for all workers; 0 takes a free one, and the log says which."""
    traces: CliImplicitFlag[bool] = False
    """Send OpenTelemetry traces, to where OTEL_EXPORTER_OTLP_ENDPOINT and its like say. Needs the extra otel."""

    drain_delay_s: Seconds = 0.0
    """After a SIGTERM: time to go on serving while health says NOT_SERVING, for load balancers to notice."""
    drain_s: Seconds = 30.0
    """After that: longest time for calls in flight to finish."""

    log_level: LogLevel = "info"
    """debug logs one line per call."""
    log_format: LogFormat = "text"
    """text is for people, json is one object a line."""

    @field_validator("pin")
    @classmethod
    def _check_pin(cls, pin: str) -> str:
        for version in filter(None, pin.split(",")):
            name, _, number = version.partition("/")
            if not (NAME_PATTERN.fullmatch(name) and VERSION_PATTERN.fullmatch(number)):
                raise ValueError(f"{shown(version)} is no version of a model; name each as in mnist/3,faces/1")
        return pin

    @property
    def pinned(self) -> frozenset[Key]:
        """The versions of `pin`."""
        return frozenset(Key(*version.split("/")) for version in filter(None, self.pin.split(",")))

    @property
    def batch_wait_s(self) -> float:
        """`batch_wait_us` in seconds, and in the whole milliseconds of the event loop's clock."""
        return math.ceil(self.batch_wait_us / 1000) / 1000

    @model_validator(mode="after")
    def _refuse_workers_of_envoy(self) -> Settings:
        if self.workers > 1 and self.transport == "envoy":
            raise ValueError("--workers goes with --transport grpc; Envoy is one process")
        return self

    @model_validator(mode="after")
    def _refuse_threads_of_cuda_graphs(self) -> Settings:
        if self.cuda_graphs and self.threads > self.workers:
            raise ValueError(
                f"cuda-graphs takes one thread a worker, {self.workers} in all, not {self.threads}; leave --threads out"
            )
        return self

    @model_validator(mode="after")
    def _refuse_half_of_tls(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("tls-key", "tls-cert") if self.tls_cert is None else ("tls-cert", "tls-key")
            raise ValueError(f"--{given} goes with --{missing}; give both")
        if self.client_ca is not None and self.tls_cert is None:
            raise ValueError("--client-ca goes with --tls-cert and --tls-key; clients show certificates only over TLS")
        return self

    @model_validator(mode="after")
    def _refuse_open_address(self) -> Settings:
        if self.insecure or self.tls_cert is not None or is_loopback(self.host):
            return self
        if self.tokens is None:
            raise ValueError(
                f"host {self.host} can be reached from other machines and nothing protects the server there; use "
                "127.0.0.1, or --tls-cert and --tls-key with --tokens or --client-ca, or --insecure to let anybody call"
            )
        # A token that anybody on the way can read protects from nobody who is there.
        raise ValueError(
            f"host {self.host} can be reached from other machines, and the tokens would cross the network unencrypted; "
            "add --tls-cert and --tls-key, or --insecure where a proxy or a mesh encrypts"
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches `host`. A name other than localhost may resolve to anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def from_command_line(arguments: list[str]) -> Settings:
    """Return the settings of flags, then environment, then defaults; StartError in one line if they are wrong.

    `--help` and unknown flags end the process as argparse does.
    """
    try:
        return CliApp.run(Settings, cli_args=arguments)
    except ValidationError as error:
        raise StartError("; ".join(_problem(detail) for detail in error.errors())) from None


def _problem(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    name = str(detail["loc"][0])
    return (
        f"--{name.replace('_', '-')} (or VAESERVE_{name.upper()}) is {shown(str(detail['input']))}: "
        f"{message[0].lower()}{message[1:]}"
    )

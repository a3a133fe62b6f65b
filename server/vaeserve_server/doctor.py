"""`vaeserve-server doctor`: on one screen what is installed, what really works here and how fast, and what to do next.

It takes the server's flags and does what the server would do with them, short of listening. It imports only the
standard library until it knows that the rest is there.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vaeserve_server.engine import Engine
    from vaeserve_server.graphs import Build, Runtime
    from vaeserve_server.settings import Settings

_USAGE = """usage: vaeserve-server doctor [FLAGS OF vaeserve-server]

Says what is installed, which providers really run graphs and why the others do not, whether the models are sound and
how long they take, and what to do next. Exit status: 0 if nothing is broken, 1 if something is, 2 for a wrong flag.
"""
_NEEDED = (
    "numpy",
    "grpcio",
    "protobuf",
    "grpcio-health-checking",
    "grpcio-reflection",
    "pydantic",
    "pydantic-settings",
    "prometheus-client",
)
_EXTRAS = {
    "envoy": ("--transport envoy", ("pyvoy",)),
    "oip": ("--oip", ("tritonclient",)),
    "otel": ("--traces", ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-grpc")),
}
_ONNX_RUNTIME = ("onnxruntime", "onnxruntime-gpu")
_TIMED_ROWS = (1, 8, 64, 512)
_TIMED_MODELS = 2
_MEASURE_S = 0.2
_FEWEST = 5
_MS = 1000.0
_COLUMNS = 110


class Screen:
    """What is to be read, in sections; `problems` are what is broken, `steps` what to do."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.steps: list[str] = []
        self._lines: list[str] = []

    def section(self, title: str, lines: Iterable[str]) -> None:
        """Add a heading and its lines."""
        self._lines += [title, *(f"  {line}" for line in lines)]

    def text(self) -> str:
        """Return the whole screen."""
        ends = [("Broken", self.problems), ("Next", self.steps)]
        lines = self._lines + [line for title, items in ends if items for line in (title, *(f"  - {i}" for i in items))]
        return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Examine, print, and return the exit status."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(_USAGE)
        return 0
    screen = Screen()
    if _examine_packages(screen):
        from vaeserve_server import logs, settings  # noqa: PLC0415 - not before they are known to be there
        from vaeserve_server.errors import StartError  # noqa: PLC0415

        try:
            chosen = settings.from_command_line(arguments)
        except StartError as error:
            sys.stderr.write(f"vaeserve-server doctor: {error}\n")
            return 2
        logs.configure("text", "error")  # the rest is told here
        _examine_access(screen, chosen)
        runtime = _examine_providers(screen, chosen)
        if runtime is not None:
            serve = shlex.join(["vaeserve-server", *arguments])
            asyncio.run(_examine_models(screen, chosen, runtime, serve))
    sys.stdout.write(screen.text())
    return 1 if screen.problems else 0


def _examine_packages(screen: Screen) -> bool:
    """Return whether the server can be imported."""
    runtimes = [f"{name} {version}" for name in _ONNX_RUNTIME if (version := _version(name))]
    needed = {name: _version(name) for name in _NEEDED}
    missing = [name for name, version in needed.items() if not version]
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    lines = [
        f"vaeserve {_version('vaeserve') or 'from its sources'}, {python}",
        ", ".join(runtimes) or "no ONNX Runtime",
        *textwrap.wrap(", ".join(f"{name} {version}" for name, version in needed.items() if version), _COLUMNS),
    ]
    for extra, (flag, packages) in _EXTRAS.items():
        there = [f"{name} {version}" for name in packages if (version := _version(name))]
        whole = len(there) == len(packages)
        lines.append(f"{flag}: {', '.join(there)}" if whole else f'{flag}: no; pip install "vaeserve[{extra}]"')
    screen.section("Installed", lines)
    if len(runtimes) > 1:
        screen.problems.append(f"{' and '.join(runtimes)} overwrite each other: both ship the module onnxruntime")
        screen.steps.append(f'pip uninstall {" ".join(_ONNX_RUNTIME)}, then pip install "vaeserve[server]"')
    if missing or not runtimes:
        screen.problems.append(f"missing: {', '.join([*missing, *([] if runtimes else ['onnxruntime'])])}")
        screen.steps.append('pip install "vaeserve[server]", or "vaeserve[server-cpu]" where there is no GPU')
    return not missing and bool(runtimes)


def _examine_access(screen: Screen, settings: Settings) -> None:
    """Look at certificates and tokens, where there are any."""
    from vaeserve_server import credentials, tls, tokens  # noqa: PLC0415
    from vaeserve_server.errors import StartError  # noqa: PLC0415

    lines = []
    try:
        if files := credentials.tls_files(settings):
            not_after = tls.read(files).not_after
            lines.append(f"{files.certificate}: goes with its key, expires {not_after:%Y-%m-%d %H:%M} UTC")
            if files.client_ca:
                lines.append(f"{files.client_ca}: vouches for clients")
            if not_after < datetime.now(UTC):
                screen.problems.append(f"{files.certificate} has expired")
        if settings.tokens:
            names = [token.name for token in tokens.read(settings.tokens).tokens]
            lines.append(f"{settings.tokens}: {', '.join(names) or 'no tokens, so nobody may call'}")
    except StartError as error:
        screen.problems.append(str(error))
    if lines:
        screen.section("Who may call", lines)


def _examine_providers(screen: Screen, settings: Settings) -> Runtime | None:
    """Return what the server would load graphs with, None if it would not start."""
    from vaeserve_server import cores, graphs, models  # noqa: PLC0415
    from vaeserve_server.errors import DeviceError  # noqa: PLC0415

    build = graphs.installed()
    lines = []
    for provider in build.providers:
        if provider in (graphs.CPU, graphs.CUDA):
            problem = graphs.problem_of(provider)
            lines.append(f"{provider}: {f'does not work: {problem}' if problem else 'works'}")
        else:
            lines.append(f"{provider}: not used by vaeserve")
    if graphs.CUDA not in build.providers:
        lines.append(f"{graphs.CUDA}: not built into this ONNX Runtime")
    lines.append(f"{cores.available_cores()} cores to use (of {os.cpu_count()})")
    lines += _gpu_lines(screen, build, works=f"{graphs.CUDA}: works" in lines)
    screen.section("Providers", lines)
    try:
        return models.new_runtime(settings)
    except DeviceError as error:
        screen.problems.append(str(error))
        return None


def _gpu_lines(screen: Screen, build: Build, *, works: bool) -> list[str]:
    """Return what there is of a GPU and of the libraries between it and ONNX Runtime."""
    from vaeserve_server import gpu_facts  # noqa: PLC0415

    driver = gpu_facts.driver()
    if isinstance(driver, str):
        return [f"NVIDIA driver: {driver}"]
    lines = [f"NVIDIA driver: runs CUDA up to {driver.cuda_version}; {'; '.join(driver.gpus) or 'no GPU is visible'}"]
    if not build.cuda_version:
        screen.steps.append('to use the GPU: pip uninstall onnxruntime, then pip install "vaeserve[server,cuda]"')
        return lines
    lines.append(f"ONNX Runtime: built for CUDA {build.cuda_version}")
    lines += [f"{name}: {version or problem}" for name, version, problem in gpu_facts.libraries(build.cuda_version)]
    if not works:
        if _major(driver.cuda_version) < _major(build.cuda_version):
            screen.steps.append(
                f"to use the GPU: update its driver to one for CUDA {build.cuda_version}, or install an older "
                f"onnxruntime-gpu, built for CUDA {driver.cuda_version}"
            )
        else:
            screen.steps.append('to use the GPU: pip install "vaeserve[server,cuda]", which brings CUDA and cuDNN')
    return lines


async def _examine_models(screen: Screen, settings: Settings, runtime: Runtime, serve: str) -> None:
    """Load the models as the server would and time them; `serve` is the command that serves them."""
    from vaeserve_server import models  # noqa: PLC0415
    from vaeserve_server.errors import NoModelsError, StartError  # noqa: PLC0415

    pool = models.new_pool(settings, runtime)
    try:
        loader = models.new_loader(settings, runtime, pool)
        loaded = await asyncio.to_thread(loader.first)
        screen.problems += loader.refused.values()
        lines = [f"{engine.label}: sound, digest {engine.card.digest[:12]}" for engine in loaded.engines]
        screen.section(f"Models in {settings.models}", lines)
        for engine in loaded.engines[:_TIMED_MODELS]:
            title = f"Time of {engine.label} on {engine.provider}, {pool.threads} run(s) at once, without the network"
            screen.section(title, await _time(engine))
        screen.steps.append(serve)
    except NoModelsError as error:
        screen.section("Models", [f"none in {settings.models}"])
        screen.steps.append(str(error))
    except StartError as error:
        screen.problems.append(str(error))
    finally:
        await pool.close()


async def _time(engine: Engine) -> list[str]:
    import numpy as np  # noqa: PLC0415

    random = np.random.default_rng(0)
    lines = [f"{'rows':>6}{'encode':>12}{'images/s':>12}{'decode':>12}{'images/s':>12}"]
    for rows in _TIMED_ROWS:
        if rows > engine.max_rows_per_call:
            break
        images = random.integers(0, 256, (rows, *engine.image_shape), np.uint8)
        latents = random.standard_normal((rows, *engine.latent_shape), np.float32)
        encode_s = await _median_s(partial(engine.encode, images))
        decode_s = await _median_s(partial(engine.decode, latents, np.dtype(np.float32)))
        cells = "".join(f"{s * _MS:>9.3f} ms{rows / s:>12.0f}" for s in (encode_s, decode_s))
        lines.append(f"{rows:>6}{cells}")
    return lines


async def _median_s(call: Callable[[], Awaitable[object]]) -> float:
    """Return the median time of a call, after a first one that does not count."""
    await call()
    times: list[float] = []
    while len(times) < _FEWEST or sum(times) < _MEASURE_S:
        began = time.perf_counter()
        await call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _version(package: str) -> str:
    """Return a package's version, '' if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _major(version: str) -> int:
    return int(version.partition(".")[0])

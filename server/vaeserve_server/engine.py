"""One served model on arrays: what it takes, and what it refuses before anything is queued, in words for its caller."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Timer

import numpy as np

from vaeserve_server.batcher import Batcher, Outputs
from vaeserve_server.bundle import DECODER, ENCODER, PRIOR, Bundle, check_digest, check_ports
from vaeserve_server.checks import Array, check_range, is_finite, not_finite
from vaeserve_server.condition import Condition
from vaeserve_server.errors import (
    BundleError,
    GraphLoadError,
    GraphRunError,
    InvalidInputError,
    NoFittedPriorError,
    NotServingError,
    StartError,
)
from vaeserve_server.executor import Run, RunPool
from vaeserve_server.graphs import CUDA, Graph, Runtime
from vaeserve_server.latent_health import LatentHealth
from vaeserve_server.stats import GraphStats
from vaeserve_server.work import FLOAT16, FLOAT32, UINT8, DecodeWork, DType, EncodeWork, Noise, NoiseWork, PriorWork

_log = logging.getLogger(__name__)

_IMAGE_DTYPES = (UINT8, FLOAT32, FLOAT16)
_LATENT_DTYPES = (FLOAT32, FLOAT16)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# Box-Muller's largest normal, from the smallest uniform, 2**-54; times this temperature it is still a float32.
MAX_TEMPERATURE = _FLOAT32_MAX / math.sqrt(2 * 54 * math.log(2))
_STREAM_ROWS = 2**64
_GRAPH_NAMES: dict[int, str] = {ENCODER: "encoder", DECODER: "decoder", PRIOR: "prior"}  # in figures and traces
_ENVELOPE_BYTES = 4096  # a message's fields beside its tensors
_BATCH_ROWS = {CUDA: 256}
_BATCH_ROWS_CPU = 128


@dataclass(frozen=True)
class Limits:
    """Bounds of one server; see the settings of the same names. `max_batch_rows` 0 chooses by device."""

    max_rows_per_call: int
    max_message_bytes: int
    max_batch_rows: int
    max_queue_rows: int
    batch_wait_s: float
    watchdog_s: float


class InFlight:
    """Counts calls, each a `with` block around its way through the graphs. All on the event loop."""

    __slots__ = ("_calls", "_then")

    def __init__(self) -> None:
        self._calls = 0
        self._then: Callable[[], None] | None = None

    def __enter__(self) -> None:
        self._calls += 1

    def __exit__(self, *_: object) -> None:
        self._calls -= 1
        if self._then is not None:
            self.when_none(self._then)

    def when_none(self, then: Callable[[], None]) -> None:
        """Call `then` as soon as no call is on."""
        if self._calls:
            self._then = then
        else:
            self._then = None
            then()


class Engine:
    """One version of one model. Made off the event loop; its calls belong to the loop of `pool`.

    `problem` says why it cannot serve just now, empty while it can; `on_change` is called whenever that changed.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, pool: RunPool, limits: Limits) -> None:
        """Load, check and warm the bundle's graphs; BundleError or DeviceError if they cannot serve."""
        bundle = bundle.in_precision(runtime.precision)
        self.card = bundle.card
        self.label = f"{self.card.name}/{self.card.version}"
        self.image_shape = tuple(self.card.image_shape)
        self.latent_shape = tuple(self.card.latent_shape)
        batch_rows = limits.max_batch_rows or _BATCH_ROWS.get(runtime.provider, _BATCH_ROWS_CPU)
        self._graphs = graphs = {role: _load(bundle, role, runtime, batch_rows) for role in bundle.graphs}
        self.max_rows_per_call = _max_rows(self, limits)  # of shapes that are the graphs' own by now
        self.provider = graphs[ENCODER].provider
        self.precision = runtime.precision
        self._warm = {role: partial(_warm, bundle.graphs[role].path, graph) for role, graph in graphs.items()}
        for role, graph in graphs.items():
            for rows in graph.warm_rows:
                warm = partial(self._warm[role], rows, limits.watchdog_s)
                if graph.warm_everywhere:
                    pool.run_in_each(warm)  # size by size: other models' runs go between
                else:
                    warm()
        self.latent_health = LatentHealth(self.card)
        self.problem = ""
        self.on_change: Callable[[], None] = lambda: None
        self._closed = False
        self._conditions = {
            role: Condition(pool, partial(self._warm[role], graph.warm_rows[0]), self._changed)
            for role, graph in graphs.items()
        }
        self._batchers = {
            role: Batcher(
                self.latent_health.watch(graph.run) if role == ENCODER else graph.run,
                self.image_shape if role == ENCODER else self.latent_shape,
                pool,
                max_batch_rows=batch_rows,
                max_queue_rows=limits.max_queue_rows,
                wait_s=limits.batch_wait_s,
                stats=GraphStats(self.card.name, self.card.version, _GRAPH_NAMES[role]),
                condition=self._conditions[role],
            )
            for role, graph in graphs.items()
        }
        self._encoder = self._batchers[ENCODER]
        self._decoder = self._batchers[DECODER]
        self._prior = self._batchers.get(PRIOR)
        self._in_flight = InFlight()
        pool.loop.call_soon_threadsafe(pool.residents.add, self)

    async def encode(self, images: Array, draw: Noise | None = None, deadline: float = math.inf) -> Outputs:
        """Return (mean, stddev) of the posterior of each image, and mean + stddev * noise where `draw` is given.

        `images` is `(N, C, H, W)`: uint8 0..255, or float32 or float16 in 0..1. The results are float32
        `(N, *latent_shape)`. Raises InvalidInputError, QueueFullError, DeadlineError.
        """
        self._check_rows("images", images, self.image_shape, _IMAGE_DTYPES)
        if images.dtype != UINT8:
            check_range(images)
        if draw is not None:
            _check_draw(draw, len(images))
        with self._entrance():
            return await self._encoder.submit(EncodeWork(images, draw, self.latent_shape), deadline)

    async def decode(self, latents: Array, image_dtype: DType, deadline: float = math.inf) -> Array:
        """Return the mean image of each latent, `(N, C, H, W)`.

        `latents` is float32 or float16 `(N, *latent_shape)`, finite. `image_dtype` is float32 or float16 (0..1), or
        uint8 (0..255, rounded half to even). Raises InvalidInputError, QueueFullError, DeadlineError.
        """
        self._check_rows("latents", latents, self.latent_shape, _LATENT_DTYPES)
        if not is_finite(latents):
            raise not_finite("latents", latents)
        with self._entrance():
            return (await self._decoder.submit(DecodeWork(latents, image_dtype), deadline))[0]

    async def sample(
        self,
        count: int,
        draw: Noise,
        image_dtype: DType,
        *,
        temperature: float = 1.0,
        fitted_prior: bool = False,
        deadline: float = math.inf,
    ) -> Outputs:
        """Return (images, latents) of `count` draws from the prior.

        Images are `(count, C, H, W)` as `decode` gives them, latents float32 `(count, *latent_shape)`.
        `temperature` multiplies the standard deviation of the standard normal prior, or a fitted prior's base noise.
        Raises InvalidInputError, NoFittedPriorError, QueueFullError, DeadlineError.
        """
        self._check_count("count", "count is", count)
        _check_draw(draw, count)
        if not 0.0 <= temperature <= MAX_TEMPERATURE:
            raise InvalidInputError(
                "temperature",
                f"temperature is {temperature}; it must be finite, at least 0 and at most {MAX_TEMPERATURE:.3g}",
            )
        base = NoiseWork(count, draw, temperature, self.latent_shape, image_dtype)
        if not fitted_prior:
            with self._entrance():
                images, latents = await self._decoder.submit(base, deadline)
            return images, latents
        if self._prior is None:
            raise NoFittedPriorError(
                f"model {self.label} has no fitted prior; sample from the standard normal", model=self.label
            )
        with self._entrance():
            (latents,) = await self._prior.submit(PriorWork(count, draw, temperature, self.latent_shape), deadline)
            (images,) = await self._decoder.submit(DecodeWork(latents, image_dtype, "temperature"), deadline)
        return images, latents

    def full_queue(self, role: int) -> Batcher | None:
        """Return the queue of a graph if it takes not one row more."""
        batcher = self._batchers[role]
        return batcher if batcher.is_full else None

    def queued_rows(self) -> int:
        """Return the rows that wait for a run, over all graphs."""
        return sum(batcher.queued_rows for batcher in self._batchers.values())

    def graph_stats(self) -> list[tuple[GraphStats, int]]:
        """Return what each graph's queue has counted, and the rows that wait in it now."""
        return [(batcher.stats, batcher.queued_rows) for batcher in self._batchers.values()]

    def first_runs(self) -> list[Run]:
        """Return the runs that make a thread ready which came later, of graphs that can be relied on."""
        return [
            self._conditions[role].probe_by(partial(self._warm[role], rows))
            for role, graph in self._graphs.items()
            if graph.warm_everywhere and not self._closed and not self._conditions[role].problem
            for rows in graph.warm_rows
        ]

    def retire(self, unloaded: Callable[[], None]) -> None:
        """Give the memory back once the calls that are in have ended, and then call `unloaded`. No more may come."""

        def unload() -> None:
            self._end_watch()
            for graph in self._graphs.values():
                graph.unload()
            unloaded()

        self._in_flight.when_none(unload)

    def close(self) -> None:
        """Refuse what still waits, and break off what still runs."""
        self._end_watch()
        for batcher in self._batchers.values():
            batcher.close()
        for graph in self._graphs.values():
            graph.stop()

    def _entrance(self) -> InFlight:
        if self.problem:
            raise NotServingError(
                f"model {self.label} does not serve now: {self.problem}; try again, or another server"
            )
        return self._in_flight

    def _changed(self) -> None:
        """Take in the condition of a graph: break off runs that do not end, and say so."""
        if self._closed:
            return
        problems = [(role, condition.problem) for role, condition in self._conditions.items() if condition.problem]
        self.problem = "; ".join(f"{problem} in its {_GRAPH_NAMES[role]}" for role, problem in problems)
        if self.problem:
            _log.error("model does not serve", extra={"fields": {"model": self.label, "reason": self.problem}})
        else:
            _log.info("model serves again", extra={"fields": {"model": self.label}})
        self.on_change()
        # Last: a run that ends at once may be back before watchers of health have heard that there was a problem.
        for role, condition in self._conditions.items():
            if condition.stalled:
                self._graphs[role].stop()
            else:
                self._graphs[role].resume()

    def _end_watch(self) -> None:
        self._closed = True
        for condition in self._conditions.values():
            condition.close()

    def _check_rows(self, field: str, rows: Array, row_shape: tuple[int, ...], dtypes: Sequence[DType]) -> None:
        if rows.shape[1:] != row_shape:
            raise InvalidInputError(field, self._shape_problem(field, rows.shape, row_shape))
        if rows.dtype not in dtypes:
            taken = " or ".join(dtype.name for dtype in dtypes)
            raise InvalidInputError(field, f"{field} are {rows.dtype.name}; model {self.label} takes {taken}")
        self._check_count(field, f"{field} have", len(rows), " rows")

    def _check_count(self, field: str, subject: str, count: int, unit: str = "") -> None:
        if not 1 <= count <= self.max_rows_per_call:
            raise InvalidInputError(
                field,
                f"{subject} {count}{unit}; one call to model {self.label} takes 1 to {self.max_rows_per_call} rows",
            )

    def _shape_problem(self, field: str, given: tuple[int, ...], row_shape: tuple[int, ...]) -> str:
        if len(given) == len(row_shape) + 1:
            return f"{field} have shape {given[1:]}; model {self.label} takes {row_shape}"
        with_rows = ", ".join(["N", *map(str, row_shape)])
        return f"{field} have shape {given} in all; model {self.label} takes ({with_rows}), N rows of shape {row_shape}"


def _check_draw(draw: Noise, rows: int) -> None:
    if draw.first_row + rows > _STREAM_ROWS:
        raise InvalidInputError(
            "first_row",
            f"first_row is {draw.first_row} and the call has {rows} rows; a seed's stream ends at row 2**64",
        )


def _max_rows(engine: Engine, limits: Limits) -> int:
    """Return the most rows of a call, so that request and answer are at most half a message."""
    image_bytes, latent_bytes = 4 * math.prod(engine.image_shape), 4 * math.prod(engine.latent_shape)
    row_bytes = max(image_bytes + latent_bytes, 3 * latent_bytes)  # Sample's answer, Encode's answer
    rows = (limits.max_message_bytes // 2 - _ENVELOPE_BYTES) // row_bytes
    if rows < 1:
        raise StartError(
            f"one row of model {engine.label} takes {row_bytes} bytes, more than half of --max-message-bytes "
            f"{limits.max_message_bytes}; raise it"
        )
    return min(rows, limits.max_rows_per_call)


def _load(bundle: Bundle, role: int, runtime: Runtime, max_rows: int) -> Graph:
    file = bundle.graphs[role]
    try:
        graph = runtime.load(file.data, max_rows)
    except GraphLoadError as error:
        raise BundleError(file.path, f"ONNX Runtime does not take the graph ({error})") from None
    check_ports(bundle, role, graph.inputs, graph.outputs)
    check_digest(bundle, role, graph.metadata)
    return graph


def _warm(path: Path, graph: Graph, rows: int, limit_s: float = 0.0) -> None:
    """Run the graph on `rows` rows, so that no caller pays for a first run, and check what comes back.

    BundleError if it does not run, or not within `limit_s` (0: whatever it takes).
    """
    batch = np.zeros((rows, *(axis or 0 for axis in graph.inputs[0].shape[1:])), np.float32)
    too_long = BundleError(path, f"the graph's run on {rows} rows does not end within {limit_s:g} s")
    try:
        with _time_limit(graph, limit_s):
            outputs = graph.run(batch)
    except GraphRunError as error:
        raise BundleError(path, f"the graph does not run on {rows} rows ({error})") from None
    except NotServingError:
        raise too_long from None
    if limit_s and graph.stopped:  # just as the run ended
        raise too_long
    for port, output in zip(graph.outputs, outputs, strict=True):
        if output.shape != (rows, *port.shape[1:]) or not is_finite(output):
            raise BundleError(path, f"{port.name} for {rows} rows of zeros is not finite {(rows, *port.shape[1:])}")


@contextmanager
def _time_limit(graph: Graph, limit_s: float) -> Iterator[None]:
    """Stop the graph, for good, if the block takes longer than `limit_s` (0: whatever it takes)."""
    if not limit_s:
        yield
        return
    breaker = Timer(limit_s, graph.stop)
    breaker.daemon = True
    breaker.start()
    try:
        yield
    finally:
        breaker.cancel()
        breaker.join()  # it may be past the point at which it can be cancelled

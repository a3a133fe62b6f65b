"""Whether a graph can be relied on, as its own runs show: one that stalls, or fails on anything, is not to be called.

A run that failed may be its input's fault, and no input may take a model out of service. So a failure only raises the
question; the answer is a run on what the graph was warmed with before it served, again and again until it succeeds.
"""

from __future__ import annotations

from collections.abc import Callable

from vaeserve_server.executor import Run, RunPool

_PROBE_S = 1.0


class Condition:
    """The condition of one graph. All on the event loop."""

    def __init__(
        self,
        pool: RunPool,
        probe: Callable[[], object] = lambda: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Find out by `probe`, which is called in a thread of `pool` and raises; `on_change` follows each change."""
        self._pool = pool
        self._probe = probe
        self._on_change = on_change
        self._stalled_runs = 0
        self._fails = False
        self._asking = False
        self._closed = False

    @property
    def stalled(self) -> bool:
        """Whether a run of it does not end."""
        return self._stalled_runs > 0

    @property
    def problem(self) -> str:
        """What is wrong with it, in words; empty while it can be relied on."""
        if self.stalled:
            return "a run does not end"
        return "runs fail" if self._fails else ""

    def run_stalled(self) -> None:
        """Note that a run has been on for too long."""
        self._stalled_runs += 1
        self._on_change()

    def run_returned(self) -> None:
        """Note that a run which had stalled has ended after all."""
        self._stalled_runs -= 1
        self._on_change()

    def run_failed(self) -> None:
        """Note that a run failed, and find out whose fault it was."""
        if not self._asking and not self._closed:
            self._asking = True
            self._pool.submit(self.probe_by(self._probe))

    def probe_by(self, probe: Callable[[], object]) -> Run:
        """Return a run of `probe` whose outcome is the graph's condition."""
        return _Probe(probe, self)

    def close(self) -> None:
        """Ask no more."""
        self._closed = True

    def answer(self, *, fails: bool) -> None:
        """Take in what a probe came to."""
        self._asking = False
        if self._closed:
            return
        if fails:
            self._pool.loop.call_later(_PROBE_S, self.run_failed)
        if fails != self._fails:
            self._fails = fails
            self._on_change()


class _Probe:
    """One run on nobody's rows."""

    may_stall = True

    def __init__(self, probe: Callable[[], object], condition: Condition) -> None:
        self._probe = probe
        self._condition = condition
        self._fails = False
        self._stalled = False

    def execute(self) -> None:
        try:
            self._probe()
        except Exception:  # noqa: BLE001 - whatever it is, the graph does not run
            self._fails = True

    def complete(self) -> None:
        if self._stalled:
            self._condition.run_returned()
        self._condition.answer(fails=self._fails)

    def stall(self) -> None:
        self._stalled = True
        self._condition.run_stalled()

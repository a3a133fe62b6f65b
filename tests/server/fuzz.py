"""Fuzz a server of this checkout over real connections, print what came of it, and fail at the first fault.

    make fuzz ARGS="200000 --transport envoy"

A fault is a status other than those that blame the caller, a process that died, a good call that failed or was answered
wrongly, or memory that grew by a tenth.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from bundles import write_several
from fuzzing import FuzzError, fuzz, memory, serve, table

GROWTH = 1.1


def main() -> int:
    parser = argparse.ArgumentParser(description="Throw hostile requests at every RPC of a server.")
    parser.add_argument("cases", type=int, nargs="?", default=200_000, help="how many (default: %(default)s)")
    parser.add_argument("--transport", choices=["grpc", "envoy"], default="grpc")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: %(default)s)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the server would outlive its fuzzer
    with tempfile.TemporaryDirectory() as folder:
        models = write_several(Path(folder) / "models")
        with serve(models, options.transport) as served:
            try:
                tally = fuzz(served, models, options.cases, first_seed=options.seed, say=_overwrite)
            except FuzzError as error:
                print(f"\nFAULT: {error}", file=sys.stderr)
                return 1
    print(f"\r{options.transport}:{' ' * 40}\n{table(tally)}")
    before, after = memory(tally)
    if after > GROWTH * before:
        print(f"FAULT: memory grew from {before:.0f} to {after:.0f} MiB", file=sys.stderr)
        return 1
    return 0


def _overwrite(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line} ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

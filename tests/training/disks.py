"""Every writer on a disk that is full, and on one that is read-only: what it says, and what it leaves.

    python disks.py FULL READ_ONLY AMPLE

FULL is a disk of its own, small and empty; READ_ONLY holds a finished run, and nobody may write to it; AMPLE is an
ordinary folder. Prints a JSON object of two, "full" and "read-only": by writer the exit status (null for a plain
function), what it wrote to standard output and standard error or raised, and what is left on the disk. `command` makes
the disks, in a mount namespace that ends with its process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_UNSHARE = ["unshare", "--mount", "--map-root-user"]
DISK_BYTES = 2**21
FILLER = "filler"


@cache
def why_not() -> str:
    """Return why no disk can be mounted here, '' if one can."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return "needs unshare and mount, of util-linux"
    tried = subprocess.run(
        [*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, timeout=20, check=False
    )
    return "" if tried.returncode == 0 else f"needs a user namespace that may mount: {tried.stderr.strip()}"


def command(full: Path, read_only: Path, ample: Path) -> list[str]:
    """Return the command that runs this program with its disks at `full` and `read_only`."""
    small, fixed = shlex.quote(str(full)), shlex.quote(str(read_only))
    mounts = [
        f"mount -t tmpfs -o size={DISK_BYTES} tmpfs {small}",
        f"mount --bind {fixed} {fixed}",
        f"mount -o remount,bind,ro {fixed}",
    ]
    program = [sys.executable, "-W", "ignore", __file__, str(full), str(read_only), str(ample)]
    return [*_UNSHARE, "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh", *program]


def leave(folder: Path, room_bytes: int) -> None:
    """Fill the disk but for so many bytes."""
    (folder / FILLER).unlink(missing_ok=True)
    with (folder / FILLER).open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(folder).free - room_bytes)))


def outcome(writer: Callable[[], Any], folder: Path) -> dict[str, Any]:
    """Run a writer; return what came of it."""
    out, err = io.StringIO(), io.StringIO()
    status: int | None = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = writer()
        except Exception as error:  # noqa: BLE001 - which one it is is what the test asks
            err.write(f"{type(error).__name__}: {error}")
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "left": [x for x in left if x != FILLER]}


def on_full_disk(disk: Path) -> dict[str, dict[str, Any]]:
    import numpy as np

    from runs import tiny_config
    from vaeserve import _files
    from vaeserve_training import atomic, figures, sources
    from vaeserve_training.__main__ import main
    from vaeserve_training.ladder.cache import Cache, Entry

    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        ample = Path(name)
        images = np.random.default_rng(0).integers(0, 256, (130, 4, 4), dtype=np.uint8)
        np.savez(ample / "images.npz", train_images=images[:100], test_images=images[100:])
        config = tiny_config(data={"dataset": "arrays", "path": ample / "images.npz"})
        atomic.write_file(ample / "tiny.json", config.to_json().encode())
        run = ["--run-dir", str(ample / "run"), "--quiet"]
        fit = ["fit", "--config", str(ample / "tiny.json")]
        outcome(lambda: main([*fit, *run]), ample)

        def attempt(writer: str, room_bytes: int, act: Callable[[], Any]) -> None:
            leave(disk, room_bytes)
            found[writer] = outcome(act, disk)

        here = ["--run-dir", str(disk / "run"), "--quiet"]
        attempt("fit", 72_000, lambda: main([*fit, *here]))
        (disk / FILLER).unlink()
        found["fit, with room again"] = outcome(lambda: main(["fit", *here, "--resume"]), disk)
        attempt("fit, from the start", 0, lambda: main([*fit, "--run-dir", str(disk / "new"), "--quiet"]))
        attempt("fit-prior", 0, lambda: main(["fit-prior", *here, "--prior.steps", "2"]))
        shutil.rmtree(disk / "run")
        shutil.rmtree(disk / "new", ignore_errors=True)
        attempt("export", 8192, lambda: main(["export", *run, "--models", str(disk / "models"), "--name", "tiny"]))
        attempt("evaluate", 0, lambda: main(["evaluate", *run, "--output", str(disk / "figures.json")]))
        big = np.zeros((64, 3, 64, 64), np.uint8)
        picture = disk / "picture.png"
        attempt("figures", 0, lambda: figures.sample_grid(big.astype(np.float32), picture))
        cache = Cache(disk / "cache")
        attempt("ladder", 8192, lambda: cache.get({"a": 1}, lambda: Entry({"w": _weights(100_000)}, {})))
        attempt("data cache", 4096, lambda: sources._write_cache(disk / "cache" / "file.gz", bytes(100_000)))
        attempt("vaeserve .npy", 4096, lambda: _files.write_images(disk / "images.npy", big))
        attempt("vaeserve .npz", 4096, lambda: _files.write_images(disk / "images.npz", big))
        noise = np.random.default_rng(0).integers(0, 256, big.shape, dtype=np.uint8)
        attempt("vaeserve .png", 4096, lambda: _files.write_images(picture, noise))
        attempt("vaeserve folder", 40_960, lambda: _files.write_images(disk / "images", noise))
    return found


def _weights(count: int) -> Any:
    import torch

    return torch.zeros(count)


def on_read_only_disk(disk: Path, ample: Path) -> dict[str, dict[str, Any]]:
    from vaeserve_training.__main__ import main

    run = ["--run-dir", str(disk / "run"), "--quiet"]
    commands = {
        "fit": ["fit", "--config", str(disk / "tiny.json"), "--run-dir", str(disk / "new"), "--quiet"],
        "evaluate": ["evaluate", *run],
        "fit-prior": ["fit-prior", *run, "--prior.steps", "2"],
        "export into it": ["export", *run, "--models", str(disk / "models"), "--name", "tiny"],
        "export from it": ["export", *run, "--models", str(ample / "models"), "--name", "tiny"],
        "ladder": ["ladder", "--steps", "1", "--out", str(disk / "ladder"), "--quiet"],
    }
    data = ["--data.dataset", "arrays", "--data.path", str(disk / "images.npz"), "--data.image-shape", "1,4,4"]
    commands["ladder"] += data
    return {name: outcome(lambda words=words: main(words), disk) for name, words in commands.items()}  # type: ignore[misc]


def spare_the_exporter() -> None:
    """Publish stand-ins for the graphs, larger than what is left of the full disk: PyTorch's exporter takes seconds."""
    from vaeserve_training import onnx_graphs, parity

    onnx_graphs.build_encoder = onnx_graphs.build_decoder = lambda *_: bytes(20_000)  # type: ignore[assignment]
    parity.measure = lambda *_: []  # type: ignore[assignment]


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    os.environ["OMP_NUM_THREADS"] = "1"
    full, read_only, ample = map(Path, sys.argv[1:])
    spare_the_exporter()
    json.dump({"full": on_full_disk(full), "read-only": on_read_only_disk(read_only, ample)}, sys.stdout)

"""The tour of `make run`: train a model if there is none, serve it, and ask it over gRPC, as any other program would.

    python client/examples/quickstart.py

Trainer and server are processes of their own; this one speaks to the server through the public SDK alone, and leaves
pictures and a summary in runs/quickstart/. A second run finds the model and takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from vaeserve import Client, Encoding, ModelInfo, VaeserveError
from vaeserve_training import figures
from vaeserve_training.config import DataConfig
from vaeserve_training.data import ImageData, load
from vaeserve_training.sources import DataError

NAME = "mnist"
SEED = 0
ROUNDS = 5
SPEED_IMAGES = 4096
PICTURED = 24
START_S = 60.0
STOP_S = 30.0

Images = NDArray[np.uint8]


class StepError(Exception):
    """A step of the tour failed; the message says which, why, and what to look at."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the tour; return 0, 1 if a step failed, 130 after Ctrl-C."""
    options = parse(arguments)
    began = time.perf_counter()
    try:
        summary = tour(options, began)
    except (StepError, VaeserveError, DataError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    show(summary, options.runs / "quickstart")
    return 0


def tour(options: argparse.Namespace, began: float) -> dict[str, Any]:
    """Train if need be, serve, ask, draw; return the summary that is also written to summary.json."""
    output = options.runs / "quickstart"
    output.mkdir(parents=True, exist_ok=True)
    run_dir = options.runs / NAME
    if not any(options.models.glob(f"{NAME}/*/model.json")):
        train(options, run_dir)
    data = load(data_config(options))
    with serving(options.models, output / "server.log") as target, Client(target, model=NAME) as client:
        client.wait_ready(START_S)
        info = client.model()
        images = as_encoder_input(data.test, info)
        codes = client.encode(images, progress=True)
        copies = client.decode(codes, progress=True)
        samples = client.sample(64, seed=SEED)
        draw(output, data, codes, copies, samples.images)
        speeds = measure(client, images, codes, options.models / info.name / info.version, info)
    summary = {
        "model": str(info.ref),
        "digest": info.digest,
        **held_out_figures(info),
        "training_s": training_s(run_dir),
        "total_s": time.perf_counter() - began,
        "parity_max_abs_error": max((p.max_abs_error for g in info.card.graphs for p in g.parity), default=None),
        "provider": info.provider,
        **speeds,
        "test_images": len(images),
        "samples_seed": samples.seed,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def train(options: argparse.Namespace, run_dir: Path) -> None:
    """Fit, evaluate and export in processes of their own; a run that was cut off is gone on with."""
    # A run that was killed before it wrote its configuration has nothing to go on with.
    flags = ["--resume"] if (run_dir / "config.json").is_file() else ["--preset", NAME]
    if options.epochs is not None:
        flags += ["--optimiser.epochs", str(options.epochs)]
    if options.data is not None:
        flags += ["--data.dataset", data_config(options).dataset, "--data.path", str(options.data)]
    trainer("fit", "--run-dir", str(run_dir), *flags)
    trainer("evaluate", "--run-dir", str(run_dir))
    trainer("export", "--run-dir", str(run_dir), "--models", str(options.models), "--name", NAME)


def trainer(*arguments: str) -> None:
    """Run one command of `vaeserve-train` to its end; StepError if it fails."""
    command = [sys.executable, "-m", "vaeserve_training", *arguments]
    print(f"\n$ vaeserve-train {shlex.join(arguments)}", flush=True)
    with subprocess.Popen(command) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it got the Ctrl-C too, and is saving
            raise
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise StepError(f"`vaeserve-train {arguments[0]}` failed with exit status {status}; its own words are above")


@contextlib.contextmanager
def serving(models: Path, log: Path) -> Iterator[str]:
    """Run a server of `models` on a free port of this machine; yield its address; stop it at the end."""
    command = [sys.executable, "-m", "vaeserve_server", "--models", str(models), "--port", "0", "--no-metrics"]
    print(f"\n$ vaeserve-server {shlex.join(command[3:])}", flush=True)
    with log.open("w") as log_file:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log_file, text=True)
    limit = threading.Timer(START_S, server.kill)
    limit.start()
    try:
        target = read_target(server)
        limit.cancel()
        if target is None:
            raise StepError(f"the server did not start; {last_words(log)}")
        yield target
    finally:
        limit.cancel()
        stop(server, log)


def read_target(server: subprocess.Popen[str]) -> str | None:
    """Return the address that a server says it serves on; None if it ends without."""
    for line in server.stdout or ():
        print(line.rstrip(), flush=True)
        if found := re.match(r"serving .* on (\S+:\d+)", line):
            return found[1]
    return None


def stop(server: subprocess.Popen[str], log: Path) -> None:
    """Ask the server to drain and end; StepError if it has to be killed, unless another error is on its way."""
    server.terminate()
    try:
        status = server.wait(STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        status = server.wait()
    finally:
        if server.stdout:
            server.stdout.close()
    if status and sys.exception() is None:
        raise StepError(f"the server ended with exit status {status}; {last_words(log)}")


def last_words(log: Path) -> str:
    """Return the end of a log file and where the rest is."""
    lines = log.read_text().strip().splitlines()
    return f"it last said: {lines[-1]} (all of it is in {log})" if lines else f"it said nothing ({log} is empty)"


def as_encoder_input(images: Images, info: ModelInfo) -> Images:
    """Return what the model's encoder was trained to see: a Bernoulli sample of each image, or the image itself."""
    if info.encoder_input != "binarised":
        return images
    uniform = np.random.default_rng(SEED).random(images.shape, dtype=np.float32)
    return np.where(uniform * np.float32(255) < images, np.uint8(255), np.uint8(0))


def draw(output: Path, data: ImageData, codes: Encoding, copies: NDArray[Any], samples: NDArray[Any]) -> None:
    """Write the three pictures."""
    originals, back = data.test[:PICTURED], copies[:PICTURED]
    figures.reconstructions(originals, back, output / "reconstructions.png", title=f"Test images of {data.name}")
    figures.sample_grid(samples, output / "samples.png", columns=8, title="Decoded draws from N(0, I)")
    figures.latent_space(codes.mean, data.test_labels, output / "latent_space.png", title="Means of the test images")


def measure(client: Client, images: Images, codes: Encoding, bundle: Path, info: ModelInfo) -> dict[str, float]:
    """Return images a second through the SDK and of ONNX Runtime alone, in turn: medians over the rounds."""
    ours: dict[str, list[float]] = {"encode": [], "decode": []}
    limit: dict[str, list[dict[str, float]]] = {"encode": [], "decode": []}
    verbs: dict[str, Callable[[], object]] = {
        "encode": lambda: client.encode(images),
        "decode": lambda: client.decode(codes),
    }
    with onnxruntime_alone(bundle, info.provider, images[:SPEED_IMAGES]) as ask:
        for name in verbs:
            ask(name)  # the first run of a session is not like the others
        for _ in range(ROUNDS):
            for name, verb in verbs.items():
                began = time.perf_counter()
                verb()
                ours[name].append(len(images) / (time.perf_counter() - began))
                limit[name].append(ask(name))
    return {
        "encode_images_per_s": statistics.median(ours["encode"]),
        "decode_images_per_s": statistics.median(ours["decode"]),
        "onnxruntime_encode_images_per_s": best_setting(limit["encode"]),
        "onnxruntime_decode_images_per_s": best_setting(limit["decode"]),
    }


@contextlib.contextmanager
def onnxruntime_alone(bundle: Path, provider: str, images: Images) -> Iterator[Callable[[str], dict[str, float]]]:
    """Yield a function that has ONNX Runtime itself encode or decode; it returns images a second by setting."""
    script = Path(__file__).with_name("onnxruntime_speed.py")
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", images)
        command = [sys.executable, str(script), str(bundle), provider, f"{folder}/images.npy"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin and process.stdout
            requests, answers = process.stdin, process.stdout

            def ask(name: str) -> dict[str, float]:
                print(name, file=requests, flush=True)
                answer = answers.readline()
                if not answer:
                    raise StepError("measuring ONNX Runtime alone failed; its own words are above")
                speeds: dict[str, float] = json.loads(answer)
                return speeds

            try:
                yield ask
            finally:
                requests.close()


def best_setting(rounds: list[dict[str, float]]) -> float:
    """Return the median over the rounds of the setting whose median is highest."""
    return max(statistics.median(speeds[setting] for speeds in rounds) for setting in rounds[0])


def held_out_figures(info: ModelInfo) -> dict[str, Any]:
    """Return the card's figures for the input that the encoder was trained on."""
    card = info.card
    matching = [each for each in card.evaluations if each.encoder_input == card.encoder_input]
    found = next(iter([*matching, *card.evaluations]), None)
    names = ("neg_elbo_nats", "rate_nats", "distortion_nats", "active_units")
    values = {name: getattr(found, name) if found and found.HasField(name) else None for name in names}
    return {**values, "protocol": found.protocol if found else None}


def training_s(run_dir: Path) -> float | None:
    """Return how long the run's epochs took in all; None if the model was not trained here."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        return None
    return float(sum(json.loads(line)["seconds"] for line in metrics.read_text().splitlines()))


def show(summary: dict[str, Any], output: Path) -> None:
    """Print the summary as a short table, and where everything is."""
    table = Table("", "", "", title=f"{summary['model']} on {summary['provider']}", show_header=False)
    rows = {
        "-ELBO": ("neg_elbo_nats", ".2f", "nats per image"),
        "rate": ("rate_nats", ".2f", "nats per image"),
        "distortion": ("distortion_nats", ".2f", "nats per image"),
        "active units": ("active_units", "d", "latents"),
        "parity, ONNX against PyTorch": ("parity_max_abs_error", ".1e", "at most"),
        "encode through the SDK": ("encode_images_per_s", ",.0f", "images/s"),
        "encode, ONNX Runtime alone": ("onnxruntime_encode_images_per_s", ",.0f", "images/s"),
        "decode through the SDK": ("decode_images_per_s", ",.0f", "images/s"),
        "decode, ONNX Runtime alone": ("onnxruntime_decode_images_per_s", ",.0f", "images/s"),
        "training": ("training_s", ".1f", "s"),
        "this tour": ("total_s", ".1f", "s"),
    }
    for words, (key, form, unit) in rows.items():
        value = summary[key]
        table.add_row(words, "unknown" if value is None else format(value, form), "" if value is None else unit)
    Console().print(table)
    print(f"held-out figures: {summary['protocol']}")
    print(f"pictures and summary: {output}/")


def data_config(options: argparse.Namespace) -> DataConfig:
    """Return where the images come from: MNIST, in a folder of the user's if named, or an array file."""
    is_file = options.data is not None and options.data.suffix in {".npy", ".npz"}
    return DataConfig(dataset="arrays" if is_file else "mnist", path=options.data)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; wrong usage ends the process with status 2."""
    parser = argparse.ArgumentParser(description="Train a VAE on MNIST if need be, serve it, and tour it over gRPC.")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of bundles (default: models)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--epochs", type=int, help="training epochs (default: the preset's)")
    parser.add_argument("--data", type=Path, help="a folder with the four MNIST files, or an .npz of images")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

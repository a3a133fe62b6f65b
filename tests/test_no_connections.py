"""Nothing opens a connection that the user did not ask for: server, clients, training and export see only loopback."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import isolated

MNIST_SUBSET = Path(__file__).parent / "data" / "mnist_subset.npz"
NOTHING = {"without a route": 0, "connections that failed": 0, "names looked up": 0}

pytestmark = [
    pytest.mark.skipif(
        isolated.available() is None, reason="needs `unshare --net`, which is not there or not permitted here"
    ),
    pytest.mark.timeout(isolated.LIMIT_S),
]

SERVE_AND_CALL = """
import asyncio, subprocess, sys
import numpy as np
from vaeserve import AsyncClient, Client

models, transport = sys.argv[1:]
flags = ["--models", models, "--transport", transport, "--port", "0", "--metrics-port", "0", "--device", "cpu"]
server = subprocess.Popen([sys.executable, "-m", "vaeserve_server", *flags], stdout=subprocess.PIPE, text=True)
target = server.stdout.readline().split(" on ")[1].split(" ")[0]
with Client(target) as client:
    client.wait_ready()
    codes = client.encode(np.zeros((3, 28, 28), np.uint8))
    print(client.decode(codes).shape, client.sample(2, seed=1).images.shape, client.models()[0].ref)

async def call():
    async with AsyncClient(target) as client:
        await client.sample(1)

asyncio.run(call())
subprocess.run([sys.executable, "-m", "vaeserve", "info", "--target", target], check=True)
server.terminate()
sys.exit(server.wait(30))
"""

TRAIN_AND_EXPORT = """
import sys
from vaeserve_training.__main__ import main

data, folder = sys.argv[1:]
fit = ["fit", "--data.dataset", "arrays", "--data.path", data, "--data.limit-train", "64", "--data.limit-test", "64"]
fit += ["--preset", "mnist-mlp", "--optimiser.epochs", "1", "--run.threads", "1", "--run-dir", f"{folder}/run"]
export = ["export", "--run-dir", f"{folder}/run", "--models", f"{folder}/models", "--name", "mnist"]
sys.exit(main(fit) or main(export))
"""

TRY = """
import contextlib, socket
for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with contextlib.suppress(OSError):
            socket.socket(family, kind).connect((address, 443))
with contextlib.suppress(OSError):
    socket.create_connection(("127.0.0.1", 4317), 5)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
    query.sendto(b"a query", ("127.0.0.1", 53))
"""


def python(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def test_what_is_tried_is_seen() -> None:
    told = isolated.attempts({"try": python(TRY)})["try"]
    assert told["status"] == 0, told["said"]
    assert told["tried"]["without a route"] >= 2  # four, where the machine has IPv6
    assert told["tried"]["connections that failed"] >= 1
    assert told["tried"]["names looked up"] == 1


def test_a_name_that_is_looked_up_is_seen() -> None:
    told = isolated.attempts({"look": python("import socket; socket.getaddrinfo('vaeserve.example', 443)")})["look"]
    assert told["tried"] != NOTHING


@pytest.mark.parametrize("transport", ["grpc", "envoy"])
def test_serving_and_calling_stays_on_this_machine(models_dir: Path, transport: str) -> None:
    if transport == "envoy" and find_spec("pyvoy") is None:
        pytest.skip("the server behind Envoy is an extra")
    told = isolated.attempts({"serve": python(SERVE_AND_CALL, models_dir, transport)})["serve"]
    assert told["status"] == 0, told["said"]
    assert "(3, 1, 28, 28) (2, 1, 28, 28) mnist/1" in told["said"]
    assert told["tried"] == NOTHING, told["said"]


def test_training_and_export_stay_on_this_machine(tmp_path: Path) -> None:
    told = isolated.attempts({"train": python(TRAIN_AND_EXPORT, MNIST_SUBSET, tmp_path)}, OMP_NUM_THREADS="1")["train"]
    assert told["status"] == 0, told["said"]
    assert (tmp_path / "models" / "mnist" / "1" / "model.json").is_file()
    assert told["tried"] == NOTHING, told["said"]

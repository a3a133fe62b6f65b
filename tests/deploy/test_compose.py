"""docker-compose.yml for real: images are built, a model is trained, served, called and survives a restart.

`make test-compose` runs this; it needs a docker engine, minutes and a package index, as the rest of the suite does not.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from certificates import Authority
from compose_file import COMPOSE_FILE, services, with_tls
from vaeserve import TLS, Client, PermissionDenied, Unauthenticated, Unavailable

REPOSITORY = Path(__file__).parents[2]
COMPOSE_FILES = [COMPOSE_FILE, Path(__file__).parent / "compose.test.yml"]
# Of the default preset, only the time it takes.
TRAIN_ARGS = "--optimiser.epochs 1 --data.limit-train 4096 --data.limit-test 512"
SERVER_IMAGE_LIMIT_BYTES = 450e6
HEALTHY_S = 90.0

pytestmark = [
    pytest.mark.skipif("VAESERVE_TEST_COMPOSE" not in os.environ, reason="`make test-compose` runs it"),
    pytest.mark.timeout(1800),
]


@dataclass
class Project:
    """One compose project of its own: its own images, containers and volumes, on a free port."""

    wheels: Path
    port: int
    files: list[Path] = field(default_factory=lambda: COMPOSE_FILES)
    name: str = field(default_factory=lambda: f"vaeserve-test-{uuid.uuid4().hex[:8]}")

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def volumes(self) -> list[str]:
        return docker("volume", "ls", "-q", "--filter", f"label=com.docker.compose.project={self.name}").split()

    def compose(self, *arguments: str) -> str:
        files = [word for file in self.files for word in ("-f", str(file))]
        files += ["--project-directory", str(REPOSITORY)]
        settings = {
            "VAESERVE_PORT": str(self.port),
            "VAESERVE_TEST_WHEELS": str(self.wheels),
            "VAESERVE_TRAIN_ARGS": TRAIN_ARGS,
        }
        return run(["docker", "compose", "-p", self.name, *files, *arguments], settings)

    def inspect(self, service: str) -> dict[str, Any]:
        identifier = self.compose("ps", "-a", "-q", service).strip()
        found: dict[str, Any] = json.loads(docker("inspect", identifier))[0]
        return found

    def up(self) -> None:
        """`docker compose up`, until the server's container is healthy."""
        self.compose("up", "--detach", "--no-build")
        self.wait_healthy("server")

    def wait_healthy(self, service: str) -> None:
        """Poll docker's health status; on failure show what the containers said."""
        deadline = time.monotonic() + HEALTHY_S
        while self.inspect(service)["State"]["Health"]["Status"] != "healthy":
            assert time.monotonic() < deadline, self.compose("ps", "-a") + self.compose("logs")
            time.sleep(0.5)

    def in_server(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the server's container."""
        container = self.inspect("server")["Id"]
        command = ["docker", "exec", container, "sh", "-c", script]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def run(command: list[str], settings: dict[str, str] | None = None) -> str:
    # --profile and .env decide what runs, not the machine's environment.
    environment = {name: value for name, value in os.environ.items() if name != "COMPOSE_PROFILES"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment | (settings or {}), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def docker(*arguments: str) -> str:
    return run(["docker", *arguments])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def wheels() -> Path:
    """A folder with the wheel of the very PyTorch that this environment uses, kept for the next time."""
    folder = REPOSITORY / "build" / "wheels"
    version = importlib.metadata.version("torch")
    if not list(folder.glob(f"torch-{version}-*.whl")):
        shutil.rmtree(folder, ignore_errors=True)
        run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), f"torch=={version}"])
    return folder


@pytest.fixture(scope="module")
def project(wheels: Path) -> Iterator[Project]:
    """The project, built and up; afterwards nothing of it is left."""
    project = Project(wheels, free_port())
    try:
        project.compose("build")
        project.up()
        yield project
    finally:
        project.compose("down", "--volumes", "--rmi", "local", "--timeout", "40")
    assert project.volumes == []
    assert docker("image", "ls", "--quiet", "--filter", f"reference={project.name}-*") == ""


def test_training_shows_its_progress_and_publishes_one_model(project: Project) -> None:
    log = project.compose("logs", "--no-log-prefix", "train")
    assert "epoch 1/1" in log
    assert "published /models/mnist/1" in log
    assert project.inspect("train")["State"]["ExitCode"] == 0


def test_an_encode_from_outside_is_answered(project: Project) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    with Client(project.target) as client:
        assert client.model().card.dataset.train_images == 4096
        codes = client.encode(images)
        assert codes.mean.shape == codes.stddev.shape == (5, 20)
        assert np.isfinite(codes.mean).all()
        assert (codes.stddev > 0).all()
        assert client.decode(codes).shape == (5, 1, 28, 28)


def test_standard_health_check_says_serving(project: Project) -> None:
    with grpc.insecure_channel(project.target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_server_is_published_to_this_machine_alone(project: Project) -> None:
    ports = project.inspect("server")["NetworkSettings"]["Ports"]
    published = {port: bindings for port, bindings in ports.items() if bindings}
    assert published == {"50051/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(project.port)}]}


@pytest.mark.parametrize(
    "script",
    [
        "touch /file",
        "touch /opt/vaeserve/file",
        "touch /models/file",
        "python -c 'import torch'",
        "command -v gcc || command -v cc || command -v ld || command -v make",
    ],
)
def test_server_cannot(project: Project, script: str) -> None:
    assert project.in_server(script).returncode != 0


def test_server_has_no_rights(project: Project) -> None:
    status = dict(line.split(":\t", 1) for line in project.in_server("cat /proc/1/status").stdout.splitlines())
    assert status["Uid"].split() == ["10001"] * 4
    assert status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0}


def test_server_image_is_small(project: Project) -> None:
    size_bytes = json.loads(docker("image", "inspect", project.inspect("server")["Image"]))[0]["Size"]
    assert size_bytes < SERVER_IMAGE_LIMIT_BYTES


def test_restart_serves_the_same_model_without_training(project: Project) -> None:
    with Client(project.target) as client:
        before = client.model().card
    project.compose("down", "--timeout", "40")  # the volumes stay
    project.up()
    with Client(project.target) as client:
        after = client.model().card
    assert after == before
    assert "nothing to train: /models/mnist/1 is there" in project.compose("logs", "--no-log-prefix", "train")


def test_server_drains_and_exits_cleanly(project: Project) -> None:
    project.compose("stop", "server")
    try:
        assert project.inspect("server")["State"]["ExitCode"] == 0
    finally:
        project.up()


@pytest.mark.parametrize("dockerfile", ["server/Dockerfile", "training/Dockerfile"])
def test_changed_code_does_not_install_dependencies_again(project: Project, dockerfile: str, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt", ".dockerignore", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "README.md").write_text("changed")
    for folder in ("client", "server", "training"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
        next((tmp_path / folder).glob("*/py.typed")).with_name("changed.py").write_text("changed = True\n")
    command = ["docker", "build", "--progress", "plain", "--build-context", f"wheels={project.wheels}"]
    command += ["--file", str(tmp_path / dockerfile), "--iidfile", str(tmp_path / "image"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    docker("image", "rm", (tmp_path / "image").read_text())
    install = next(line.split()[0] for line in done.stderr.splitlines() if "RUN" in line and "venv" in line)
    assert f"{install} CACHED" in done.stderr, done.stderr


def test_every_profile_starts_one_server_at_most(wheels: Path) -> None:
    """`docker compose config` also validates what is not started here: GPUs, Prometheus, Grafana."""
    project = Project(wheels, port=1)
    monitoring = {"prometheus", "grafana"}
    for profile, expected in {
        "": {"train", "server"},
        "gpu": {"train", "server-gpu"},
        "monitoring": {"train", "server"} | monitoring,
        "gpu-monitoring": {"train", "server-gpu"} | monitoring,
    }.items():
        flags = ["--profile", profile] if profile else []
        services = json.loads(project.compose(*flags, "config", "--format", "json"))["services"]
        assert set(services) == expected, profile
        for service in services.values():
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]
            assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", []))
            for mount in service["volumes"]:
                assert mount["type"] == "volume" or Path(mount["source"]).exists(), mount


def test_tls_profile_serves_who_has_a_token(project: Project, tmp_path: Path) -> None:
    """The commented profile, uncommented: started for real, beside the server, with certificates of our own."""
    authority = Authority(tmp_path)
    authority.issue("server")
    add_token = ["token", "add", "somebody", "--file", str(tmp_path / "tokens"), "--rpc", "Encode"]
    token = run([sys.executable, "-m", "vaeserve_server", *add_token]).strip()
    for name in ("server.key", "tokens"):
        (tmp_path / name).chmod(0o644)  # user 10001 is to read them
    tmp_path.chmod(0o755)
    file = tmp_path / "docker-compose.yml"
    file.write_text(with_tls(COMPOSE_FILE.read_text(), str(tmp_path)))
    encrypted = replace(project, port=free_port(), files=[file, COMPOSE_FILES[1]])
    try:
        encrypted.compose("--profile", "tls", "up", "--detach", "--build", "server-tls")
        encrypted.wait_healthy("server-tls")
        images = np.zeros((2, 28, 28), np.uint8)
        tls = TLS(root_certificates=authority.file)
        with Client(encrypted.target, tls=tls, token=token) as client:
            assert client.encode(images).mean.shape == (2, 20)
            with pytest.raises(PermissionDenied):
                client.sample(1)
        with Client(encrypted.target, tls=tls) as client, pytest.raises(Unauthenticated):
            client.encode(images)
        with Client(encrypted.target, max_attempts=1) as client, pytest.raises(Unavailable):
            client.encode(images)
    finally:
        encrypted.compose("--profile", "tls", "rm", "--stop", "--force", "server-tls")
        docker("image", "rm", "--force", f"{project.name}-server-tls")  # `down` will not know of it


def test_gpu_server_does_not_start_where_there_is_no_gpu(project: Project) -> None:
    """Not the device reservation, which docker itself refuses here, but what the server does where it gets that far."""
    image = project.inspect("server")["Image"]
    command = services(COMPOSE_FILE.read_text())["server-gpu"]["command"]
    volume = next(name for name in project.volumes if name.endswith("_models"))
    docker_run = ["docker", "run", "--rm", "--volume", f"{volume}:/models:ro", image, *command]
    done = subprocess.run(docker_run, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "device cuda cannot be used: " in done.stderr
    assert "serving" not in done.stdout


def test_build_context_holds_sources_and_nothing_else(tmp_path: Path) -> None:
    """What .dockerignore lets through, as a build sees it."""
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM scratch\nCOPY . /\n")
    out = tmp_path / "context"
    docker("build", "--quiet", "--file", str(dockerfile), "--output", f"type=local,dest={out}", str(REPOSITORY))
    files = {file.relative_to(out) for file in out.rglob("*") if file.is_file()}
    assert {file.parts[0] for file in files} == {
        "LICENSE", "README.md", "client", "constraints.txt", "pyproject.toml", "server", "training",
    }  # fmt: skip
    packages = {"vaeserve", "vaeserve_server", "vaeserve_training", "train-once.sh"}
    hashes = {"requirements.txt", *(file.name for file in (REPOSITORY / "server").glob("requirements-*.txt"))}
    assert {file.parts[1] for file in files if len(file.parts) > 1} == packages | hashes
    assert not any("__pycache__" in file.parts for file in files)


def test_an_image_says_how_to_be_safe(project: Project) -> None:
    """Without compose's flags the server does not open itself to whoever reaches the container."""
    image = project.inspect("server")["Image"]
    done = subprocess.run(["docker", "run", "--rm", image], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--insecure" in done.stderr

"""What docker-compose.yml promises and needs no docker engine to be held to; test_compose.py really runs it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from compose_file import COMPOSE_FILE, services, with_tls
from vaeserve_server.settings import Settings, from_command_line

TEXT = COMPOSE_FILE.read_text()
ALL = services(with_tls(TEXT))
SERVERS = {name: service for name, service in ALL.items() if name.startswith("server")}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Settings:
    """The settings of a service's command and environment."""
    service = SERVERS[request.param]
    for name, value in service["environment"].items():
        monkeypatch.setenv(name, value)
    return from_command_line(service["command"])


@pytest.mark.parametrize("settings", ["server"], indirect=True)
def test_cpu_server_is_open_to_whom_compose_publishes_it(settings: Settings) -> None:
    assert (settings.device, settings.host, settings.insecure) == ("cpu", "0.0.0.0", True)
    assert settings.metrics_host == "0.0.0.0"


@pytest.mark.parametrize("settings", ["server-gpu"], indirect=True)
def test_gpu_server_asks_for_cuda_which_does_not_fall_back(settings: Settings) -> None:
    assert settings.device == "cuda"
    [device] = ALL["server-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


@pytest.mark.parametrize("settings", ["server-tls"], indirect=True)
def test_tls_server_has_certificates_and_tokens(settings: Settings) -> None:
    assert not settings.insecure
    files = (settings.tls_cert, settings.tls_key, settings.tokens)
    assert [str(file) for file in files] == [f"/run/secrets/{name}" for name in ALL["server-tls"]["secrets"]]


def test_no_flag_of_a_server_is_abbreviated_or_unknown() -> None:
    known = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    for service in SERVERS.values():
        flags = {word.partition("=")[0] for word in service["command"] if word.startswith("--")}
        assert flags <= known
    (commented,) = re.findall(r"# - (--client-ca)=", TEXT)
    assert commented in known


@pytest.mark.parametrize(("name", "service"), ALL.items(), ids=ALL.keys())
def test_every_container_is_confined(name: str, service: dict[str, Any]) -> None:
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    published = [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")]
    assert bool(published) == (name == "server-tls")


def test_servers_cannot_change_models() -> None:
    for service in SERVERS.values():
        assert service["volumes"] == ["models:/models:ro"]


def test_profiles_never_start_two_servers() -> None:
    """They want the same port."""
    profiles = [profile for service in SERVERS.values() for profile in service["profiles"]]
    assert len(profiles) == len(set(profiles))
    assert "COMPOSE_PROFILES=cpu" in (COMPOSE_FILE.parent / ".env").read_text().splitlines()


def test_a_server_without_its_gpu_is_not_started_for_ever() -> None:
    assert ALL["server-gpu"]["restart"] == "on-failure:3"
    assert ALL["server"]["restart"] == "unless-stopped"


def test_images_of_others_are_pinned() -> None:
    images = [service["image"] for service in ALL.values() if "image" in service]
    assert images
    assert all(re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", image) for image in images)

"""docker-compose.yml as data, without docker: as it stands, and with its commented profile in force."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

COMPOSE_FILE = Path(__file__).parents[2] / "docker-compose.yml"


def services(text: str) -> dict[str, dict[str, Any]]:
    """Return the services by name, with YAML's anchors and merges resolved."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return found


def with_tls(text: str, folder: str = "./tls") -> str:
    """Return the file with the profile `tls` uncommented: its server, and its secrets, which lie in `folder`."""
    server = re.search(r"^  # server-tls:\n(?:^  # .*\n)+", text, re.MULTILINE)
    secrets = re.search(r"^# secrets:.*\n(?:^#   .*\n)+", text, re.MULTILINE)
    assert server is not None
    assert secrets is not None
    text = text.replace(server[0], re.sub("^  # ", "  ", server[0], flags=re.MULTILINE))
    return text.replace(secrets[0], re.sub("^# ", "", secrets[0], flags=re.MULTILINE).replace("./tls", folder))

"""What a real server says when it does not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serving import running_server
from vaeserve_server.errors import StartError


def refusal(models: Path, **settings: Any) -> str:
    """Start a real server; return why it refuses, which must be one line that is read at a glance."""
    with pytest.raises(StartError) as refused, running_server(models, **settings):
        pytest.fail("the server started")
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message

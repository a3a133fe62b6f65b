"""What the tests of training share beside a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from same_run import Kill


@pytest.fixture(scope="session", autouse=True)
def _operators_are_read_once() -> Iterator[None]:
    from known_graphs import operators_read_once

    with operators_read_once():
        yield


@pytest.fixture(scope="session")
def kill() -> Iterator[Kill]:
    """Train in another process until it is killed."""
    from same_run import killer

    with killer() as act:
        yield act

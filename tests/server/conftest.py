"""What the server's tests share: a server with several models of several shapes, and the ordinary generated stub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from bundles import write_several
from serving import RunningServer, running_server
from vaeserve.v1 import vae_pb2_grpc


@pytest.fixture(scope="session")
def several_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mnist/1, mnist/2 (digests of their own) and faces/9: colour, a spatial latent, a fitted prior."""
    return write_several(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="session")
def server(several_models: Path) -> Iterator[RunningServer]:
    """A server of those models that takes at most 100 rows a call."""
    with running_server(several_models, max_rows_per_call=100) as running:
        yield running


@pytest.fixture(scope="session")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    """A plain channel to that server."""
    with grpc.insecure_channel(server.target) as opened:
        yield opened


@pytest.fixture(scope="session")
def stub(channel: grpc.Channel) -> vae_pb2_grpc.VaeServiceStub:
    """The generated stub on that channel."""
    return vae_pb2_grpc.VaeServiceStub(channel)

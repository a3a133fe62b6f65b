"""What spares tests the time of PyTorch's exporter: graphs that they have already, and a second look at its sources."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from vaeserve_training import onnx_graphs


def reuse_graphs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare an export of that bundle's weights the seconds that PyTorch's exporter takes."""
    encoder, decoder = ((bundle / f"{role}.onnx").read_bytes() for role in ("encoder", "decoder"))
    monkeypatch.setattr(onnx_graphs, "build_encoder", lambda *_: encoder)
    monkeypatch.setattr(onnx_graphs, "build_decoder", lambda *_: decoder)


@contextlib.contextmanager
def operators_read_once() -> Iterator[None]:
    """Have the exporter parse its operators' sources once, and not for every graph: nearly half of its time.

    It is no public part of PyTorch. Where it is gone, the tests take their time.
    """
    with pytest.MonkeyPatch.context() as patched:
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            patched.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield

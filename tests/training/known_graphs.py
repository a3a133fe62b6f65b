"""Graphs that tests have already, in place of those that the exporter would make of the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from vaeserve_training import onnx_graphs


def reuse_graphs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare an export of that bundle's weights the seconds that PyTorch's exporter takes."""
    encoder, decoder = ((bundle / f"{role}.onnx").read_bytes() for role in ("encoder", "decoder"))
    monkeypatch.setattr(onnx_graphs, "build_encoder", lambda *_: encoder)
    monkeypatch.setattr(onnx_graphs, "build_decoder", lambda *_: decoder)

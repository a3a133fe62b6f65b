"""What spares tests the time of PyTorch's exporter: graphs that they have already, and a second look at its sources."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx
import pytest
from torch import nn

from vaeserve_training import bundle, onnx_graphs
from vaeserve_training.onnx_graphs import HalfPrecision


def reuse_graphs(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare an export of that bundle's weights the seconds that PyTorch's exporter takes; float16 is exported anew."""
    for role in ("encoder", "decoder"):
        ready, build = onnx.load_model(bundle_dir / f"{role}.onnx"), getattr(onnx_graphs, f"build_{role}")
        monkeypatch.setattr(onnx_graphs, f"build_{role}", functools.partial(_ready_or_built, ready, build))


def _ready_or_built(
    ready: onnx.ModelProto, build: Callable[..., bytes], module: nn.Module, row_shape: Sequence[int], digest: str
) -> bytes:
    """Return the ready graph under that digest, or, for a module in float16, the one that `build` makes."""
    if any(isinstance(part, HalfPrecision) for part in module.modules()):
        return build(module, row_shape, digest)
    (entry,) = (entry for entry in ready.metadata_props if entry.key == bundle.DIGEST_KEY)
    entry.value = digest
    return ready.SerializeToString(deterministic=True)


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

"""What the tests of training share beside a trained model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _operators_are_read_once() -> Iterator[None]:
    """Have PyTorch's exporter parse its operators' sources once, and not for every graph: nearly half of its time.

    It is no public part of PyTorch. Where it is gone, the tests take their time.
    """
    with pytest.MonkeyPatch.context() as patched:
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            patched.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield

"""Where graphs run, and the honesty about it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from bundles import brittle_encoder, encoder
from vaeserve_server import graphs
from vaeserve_server.errors import DeviceError, GraphLoadError, GraphRunError, NotServingError

GRAPH = encoder((1, 4, 4), (3,)).SerializeToString()


def test_the_probe_is_the_graph_that_its_comment_says() -> None:
    probe = onnx.load_from_string(graphs._PROBE)
    onnx.checker.check_model(probe, full_check=True)
    assert [node.op_type for node in probe.graph.node] == ["Identity"]
    assert graphs.Runtime("cpu").load(graphs._PROBE, 3).run(np.arange(3, dtype=np.float32))[0].tolist() == [0, 1, 2]


def test_cuda_is_refused_where_onnx_runtime_is_built_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match="device cuda cannot be used: ONNX Runtime is installed without CUDA"):
        graphs.Runtime("cuda")
    runtime = graphs.Runtime("auto")
    assert (runtime.provider, runtime.fell_back_to_cpu) == (graphs.CPU, False)  # no GPU build, so nothing to fall from


@pytest.mark.parametrize("problem", ["no driver", ""])
def test_auto_takes_the_gpu_or_says_that_it_fell_back(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [graphs.CUDA, graphs.CPU])
    monkeypatch.setattr(graphs, "_cuda_problem", lambda: problem)
    runtime = graphs.Runtime("auto")
    assert (runtime.provider, runtime.fell_back_to_cpu) == ((graphs.CPU, True) if problem else (graphs.CUDA, False))


@pytest.mark.skipif(graphs._cuda_problem() == "", reason="there is a GPU")
def test_a_session_that_runs_elsewhere_than_asked_is_refused() -> None:
    runtime = graphs.Runtime("cpu")
    runtime.provider = graphs.CUDA  # as if the probe had found a GPU that is gone now
    with pytest.raises((DeviceError, GraphLoadError)):
        runtime.load(GRAPH, 8)


def test_a_graph_tells_its_ports_and_metadata() -> None:
    graph = graphs.Runtime("cpu").load(GRAPH, 8)
    assert graph.inputs == [("image", "tensor(float)", (None, 1, 4, 4))]
    assert graph.outputs == [("mean", "tensor(float)", (None, 3)), ("stddev", "tensor(float)", (None, 3))]
    assert graph.metadata["vaeserve.digest"] == "d" * 64


@pytest.mark.parametrize("data", [b"", b"no graph", GRAPH[:-30]])
def test_what_is_no_graph_is_refused(data: bytes) -> None:
    with pytest.raises(GraphLoadError):
        graphs.Runtime("cpu").load(data, 8)


def test_a_failed_run_and_a_stopped_graph_are_told_apart() -> None:
    graph = graphs.Runtime("cpu").load(brittle_encoder((1, 4, 4), (3,)).SerializeToString(), 8)
    with pytest.raises(GraphRunError, match="out of data bounds"):
        graph.run(np.ones((1, 1, 4, 4), np.float32))
    graph.stop()
    with pytest.raises(NotServingError):
        graph.run(np.zeros((1, 1, 4, 4), np.float32))


def test_telemetry_is_off() -> None:
    import os

    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"

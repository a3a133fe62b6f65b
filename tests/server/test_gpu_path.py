"""What the server does on a GPU, as far as a CPU can show it: sizes, buffers, binding, options, warming."""

from __future__ import annotations

import ctypes
import gc
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bundles import ENCODER, brittle_encoder, encoder, run_directly, write_bundle
from serving import running_server
from vaeserve import tensors
from vaeserve.v1 import vae_pb2 as pb
from vaeserve.v1 import vae_pb2_grpc
from vaeserve_server import graphs, pinned
from vaeserve_server.buckets import bucket_for, bucket_sizes
from vaeserve_server.errors import DeviceError, GraphRunError, NotServingError, StartError
from vaeserve_server.settings import from_command_line

IMAGE, LATENT = (1, 4, 4), (3,)
GRAPH = encoder(IMAGE, LATENT).SerializeToString()
CONTEXT, INVALID_CONTEXT = 7, 201


class HostArrays:
    """Hands out host memory, and remembers for which thread and size."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []

    def __call__(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        self.made.append((threading.get_ident(), shape[0]))
        return np.full(shape, np.nan, np.float32)  # so that a row which nobody wrote would show


def bound(data: bytes, max_rows: int, host_arrays: graphs.NewHostArray, *, capture: bool = False) -> graphs.BoundGraph:
    session = onnxruntime.InferenceSession(data, providers=[graphs.CPU])
    return graphs.BoundGraph(session, max_rows, device="cpu", new_host_array=host_arrays, capture=capture)


@given(st.integers(1, 5000), st.data())
def test_sizes_double_up_to_the_largest_and_a_batch_takes_the_smallest_that_holds_it(
    max_rows: int, data: st.DataObject
) -> None:
    sizes = bucket_sizes(max_rows)
    assert sizes[0] == 1
    assert sizes[-1] == max_rows
    assert all(smaller < larger <= 2 * smaller for smaller, larger in itertools.pairwise(sizes))
    rows = data.draw(st.integers(1, max_rows))
    size = bucket_for(rows, sizes)
    assert rows <= size < 2 * rows or size == rows == 1
    with pytest.raises(ValueError, match=f"a batch of {max_rows + 1} rows is larger than the largest size, {max_rows}"):
        bucket_for(max_rows + 1, sizes)


@pytest.mark.parametrize(("max_rows", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_sizes_are_powers_of_two_and_the_largest(max_rows: int, sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(max_rows) == sizes


@settings(deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=12), st.booleans())
def test_a_bound_graph_gives_what_a_plain_one_gives_in_arrays_of_their_own(batches: list[int], capture: bool) -> None:
    plain = graphs.Runtime("cpu").load(GRAPH, 24)
    graph = bound(GRAPH, 24, HostArrays(), capture=capture)
    random = np.random.default_rng(sum(batches))
    given_rows = [random.random((rows, *IMAGE), np.float32) for rows in batches]
    answers = [graph.run(rows) for rows in given_rows]
    for rows, answer in zip(given_rows, answers, strict=True):  # after all runs: none wrote over another's answer
        for own, direct in zip(answer, plain.run(rows), strict=True):
            assert own.shape == direct.shape
            np.testing.assert_allclose(own, direct, rtol=1e-5, atol=1e-6)


def test_each_thread_has_buffers_of_its_own_and_makes_them_once() -> None:
    host_arrays = HostArrays()
    graph = bound(GRAPH, 4, host_arrays)
    plain = graphs.Runtime("cpu").load(GRAPH, 4)
    together = threading.Barrier(3)

    def work(value: float) -> None:
        together.wait(20)
        for rows in [1, 2, 3, 4] * 20:
            batch = np.full((rows, *IMAGE), value, np.float32)
            np.testing.assert_allclose(graph.run(batch)[0], plain.run(batch)[0], rtol=1e-5, atol=1e-6)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, [0.1, 0.2, 0.3]))
    assert len(host_arrays.made) == 9  # three threads, sizes 1, 2 and 4
    assert len(set(host_arrays.made)) == 9


def test_each_thread_has_used_the_device_before_it_locks_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    copy_in = onnxruntime.OrtValue.update_inplace

    def copy_in_on_a_gpu(value: onnxruntime.OrtValue, rows: NDArray[np.float32]) -> None:
        driver.contexts.append(CONTEXT)  # as CUDA does at a thread's first call
        copy_in(value, rows)

    monkeypatch.setattr(onnxruntime.OrtValue, "update_inplace", copy_in_on_a_gpu)
    graph = bound(GRAPH, 4, partial(pinned.page_locked, library=driver))  # type: ignore[arg-type]
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(graph.run, np.zeros((3, *IMAGE), np.float32)).result(20)
    assert len(driver.registered) == 2


def test_a_capture_is_run_under_its_own_number_whatever_runs_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def noting(session: onnxruntime.InferenceSession, binding: Any, options: Any) -> None:
        asked.append(options)
        run(session, binding, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", noting)
    graph = bound(GRAPH, 4, HostArrays(), capture=True)
    for rows in (1, 4, 1, 2):
        graph.run(np.zeros((rows, *IMAGE), np.float32))
    assert [options.get_run_config_entry("gpu_graph_id") for options in asked] == ["1", "4", "1", "2"]


@pytest.mark.parametrize("capture", [False, True])
def test_a_bound_graph_fails_and_stops_as_a_plain_one_does(capture: bool) -> None:
    graph = bound(brittle_encoder(IMAGE, LATENT).SerializeToString(), 8, HostArrays(), capture=capture)
    with pytest.raises(GraphRunError, match="out of data bounds"):
        graph.run(np.ones((3, *IMAGE), np.float32))
    assert graph.run(np.zeros((3, *IMAGE), np.float32))[0].shape == (3, *LATENT)
    graph.stop()
    for rows in (3, 1):  # of a size that was bound before, and of one that was not
        with pytest.raises(NotServingError):
            graph.run(np.zeros((rows, *IMAGE), np.float32))
    graph.resume()
    for rows in (3, 1):
        assert graph.run(np.zeros((rows, *IMAGE), np.float32))[0].shape == (rows, *LATENT)


def test_a_graph_says_what_is_to_be_run_before_it_serves() -> None:
    assert graphs.Runtime("cpu").load(GRAPH, 64).warm_rows == (1, 64)
    assert bound(GRAPH, 5, HostArrays()).warm_rows == (1, 2, 4, 5)
    assert bound(GRAPH, 2, HostArrays(), capture=True).warm_rows == (1, 1, 1, 2, 2, 2)  # until it is replayed


def test_no_caller_pays_for_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host_arrays = HostArrays()
    monkeypatch.setattr(graphs.Runtime, "load", lambda self, data, max_rows: bound(data, max_rows, host_arrays))
    folder = write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT)
    settings_given = {"threads": 2, "max_batch_rows": 8, "transport": "grpc"}  # in this process, to look inside
    with running_server(tmp_path, **settings_given) as server, grpc.insecure_channel(server.target) as channel:
        prepared = sorted(host_arrays.made)
        assert len(prepared) == len(set(prepared)) * 2  # encoder and decoder
        assert {size for _, size in prepared} == {1, 2, 4, 8}
        assert len({thread for thread, _ in prepared}) == 2
        stub = vae_pb2_grpc.VaeServiceStub(channel)
        images = np.random.default_rng(1).random((40, *IMAGE), np.float32)
        calls = [
            stub.Encode.future(pb.EncodeRequest(images=tensors.to_tensor(images[start : start + rows])))
            for start, rows in [(0, 1), (1, 3), (0, 40), (20, 8), (5, 5), (7, 1)] * 5
        ]
        for call, (start, rows) in zip(calls, [(0, 1), (1, 3), (0, 40), (20, 8), (5, 5), (7, 1)] * 5, strict=True):
            mean = tensors.from_tensor(call.result().mean)
            direct = run_directly(folder, ENCODER, images[start : start + rows])[0]
            np.testing.assert_allclose(mean, direct, rtol=1e-5, atol=1e-6)
        assert sorted(host_arrays.made) == prepared


def test_no_caller_pays_for_a_thread_that_came_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host_arrays, let_go = HostArrays(), threading.Event()
    run = graphs.BoundGraph._run

    def run_or_hang(graph: graphs.BoundGraph, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        if batch.max() == 0.75:
            assert let_go.wait(60)
        return run(graph, batch)

    monkeypatch.setattr(graphs.Runtime, "load", lambda self, data, max_rows: bound(data, max_rows, host_arrays))
    monkeypatch.setattr(graphs.BoundGraph, "_run", run_or_hang)
    for name in ("hangs", "works"):
        write_bundle(tmp_path, name, image_shape=IMAGE, latent_shape=LATENT)
    settings_given = {"threads": 1, "max_batch_rows": 4, "watchdog_s": 0.4, "drain_s": 0.0, "transport": "grpc"}

    def encode(name: str, rows: int, pixel: float) -> Any:
        images = tensors.to_tensor(np.full((rows, *IMAGE), pixel, np.float32))
        return stub.Encode.future(pb.EncodeRequest(model=pb.ModelRef(name=name), images=images))

    with running_server(tmp_path, **settings_given) as server, grpc.insecure_channel(server.target) as channel:
        stub = vae_pb2_grpc.VaeServiceStub(channel)
        prepared = list(host_arrays.made)
        with pytest.raises(grpc.RpcError, match="a run does not end"):
            encode("hangs", 1, 0.75).result(60)
        encode("works", 3, 0.5).result(60)
        later = host_arrays.made[len(prepared) :]
        assert sorted(size for _, size in later) == [1, 1, 1, 2, 2, 2, 4, 4, 4]  # of all but the encoder that hangs
        assert {thread for thread, _ in later}.isdisjoint({thread for thread, _ in prepared})
        let_go.set()


def test_a_graph_that_cannot_be_warmed_in_a_thread_is_told_as_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(graphs.Runtime, "load", lambda self, data, max_rows: bound(data, max_rows, HostArrays()))
    monkeypatch.setattr(graphs.BoundGraph, "_run", lambda self, batch: 1 / 0)
    write_bundle(tmp_path, image_shape=IMAGE, latent_shape=LATENT)
    with (
        pytest.raises(StartError, match=r"encoder\.onnx: the graph does not run on 1 rows \(ZeroDivisionError"),
        running_server(tmp_path, threads=2, transport="grpc"),
    ):
        pass


class Driver:
    """The calls that page-locked memory makes of the driver, each with the context that is current in its thread.

    `register` and `unregister` are what those two return.
    """

    def __init__(self, register: int = 0, unregister: int = 0) -> None:
        self.register = register
        self.unregister = unregister
        self.registered: list[tuple[int, int, int]] = []
        self.released: list[tuple[int, int]] = []
        self._of_thread = threading.local()

    @property
    def contexts(self) -> list[int]:
        """The thread's contexts, the current one last."""
        stack: list[int] = self._of_thread.__dict__.setdefault("contexts", [])
        return stack

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802
        context._obj.value = self.contexts[-1] if self.contexts else None
        return 0

    def cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> int:  # noqa: N802
        if not context.value:
            return INVALID_CONTEXT
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        context._obj.value = self.contexts.pop()
        return 0

    def cuMemHostRegister_v2(  # noqa: N802
        self, address: ctypes.c_void_p, size: ctypes.c_size_t, flags: ctypes.c_uint
    ) -> int:
        assert address.value
        if not self.contexts:
            return INVALID_CONTEXT
        self.registered.append((address.value, size.value, flags.value))
        return self.register

    def cuMemHostUnregister(self, address: ctypes.c_void_p) -> int:  # noqa: N802
        assert address.value
        if not self.contexts:
            return INVALID_CONTEXT
        self.released.append((address.value, self.contexts[-1]))
        return self.unregister


@pytest.mark.parametrize("code", [0, 2])
def test_page_locked_memory_is_given_back_and_its_refusal_is_logged(
    code: int, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(register=code)
    driver.contexts.append(CONTEXT)
    array = pinned.page_locked((5, 2, 3), driver)  # type: ignore[arg-type]
    assert (array.shape, array.dtype) == ((5, 2, 3), np.float32)
    assert driver.registered == [(array.ctypes.data, 120, 1)]
    assert [record.fields["cuda_error"] for record in caplog.records] == ([2] if code else [])
    address = array.ctypes.data
    del array
    gc.collect()
    assert driver.released == ([] if code else [(address, CONTEXT)])


def test_page_locked_memory_is_given_back_in_its_context_by_whatever_thread_drops_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = Driver()
    kept: list[NDArray[np.float32]] = []

    def make() -> None:
        driver.contexts.append(CONTEXT)
        kept.append(pinned.page_locked((1,), driver))  # type: ignore[arg-type]

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(20)
    address = kept[0].ctypes.data
    kept.clear()
    gc.collect()
    assert driver.released == [(address, CONTEXT)]
    assert driver.contexts == []  # what this thread had before
    assert not caplog.records


def test_memory_that_stays_locked_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    pinned._warn_of_locked_memory.cache_clear()
    driver = Driver(unregister=4)
    driver.contexts.append(CONTEXT)
    for _ in range(3):
        pinned.page_locked((1,), driver)  # type: ignore[arg-type]
    gc.collect()
    assert len(driver.released) == 3
    assert [(record.message, record.fields) for record in caplog.records] == [
        ("page-locked memory is not given back", {"cuda_error": 4})
    ]
    assert driver.contexts == [CONTEXT]


def test_provider_options_follow_the_flags() -> None:
    assert graphs.CudaOptions().provider_options() == {
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "prefer_nhwc": "0",
        "enable_cuda_graph": "0",
    }
    chosen = graphs.CudaOptions(tf32=True, nhwc=True, gpu_memory_bytes=2**30, cuda_graphs=True).provider_options()
    assert (chosen["use_tf32"], chosen["prefer_nhwc"], chosen["enable_cuda_graph"]) == ("1", "1", "1")
    assert chosen["gpu_mem_limit"] == "1073741824"


def test_a_gpu_session_gets_the_options_and_a_bound_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[graphs.CudaOptions] = []

    class Session:
        """The CPU's session, which says it is the GPU's."""

        def __init__(self) -> None:
            self._session = onnxruntime.InferenceSession(GRAPH, providers=[graphs.CPU])

        def __getattr__(self, name: str) -> object:
            return getattr(self._session, name)

        def get_providers(self) -> list[str]:
            return [graphs.CUDA, graphs.CPU]

    def session(data: bytes, provider: str, cuda: graphs.CudaOptions) -> Session:
        asked.append(cuda)
        return Session()

    monkeypatch.setattr(graphs, "_cuda_problem", lambda: "")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [graphs.CUDA, graphs.CPU])
    monkeypatch.setattr(graphs, "_session", session)
    monkeypatch.setattr(pinned, "driver", Driver)
    options = graphs.CudaOptions(cuda_graphs=True)
    graph = graphs.Runtime("cuda", options).load(GRAPH, 2)
    assert isinstance(graph, graphs.BoundGraph)
    assert graph.provider == graphs.CUDA
    assert graph.warm_rows == (1, 1, 1, 2, 2, 2)
    assert asked == [options]


def test_cuda_graphs_take_one_thread_a_worker() -> None:
    with pytest.raises(StartError, match="one thread a worker, 1 in all, not 2; leave --threads out"):
        from_command_line(["--cuda-graphs", "--threads", "2"])
    with pytest.raises(StartError, match="one thread a worker, 2 in all, not 3"):
        from_command_line(["--cuda-graphs", "--workers", "2", "--threads", "3"])
    assert from_command_line(["--cuda-graphs", "--threads", "1"]).cuda_graphs
    assert from_command_line(["--cuda-graphs", "--workers", "2", "--threads", "2"]).cuda_graphs


@pytest.mark.skipif(graphs._cuda_problem() != "", reason="needs a GPU")
@pytest.mark.parametrize("options", [graphs.CudaOptions(), graphs.CudaOptions(cuda_graphs=True, nhwc=True)])
def test_on_a_gpu_answers_are_the_cpus(options: graphs.CudaOptions) -> None:
    try:
        on_gpu = graphs.Runtime("cuda", options).load(GRAPH, 16)
    except DeviceError as error:
        pytest.fail(str(error))
    on_cpu = graphs.Runtime("cpu").load(GRAPH, 16)
    for rows in (*on_gpu.warm_rows, 3, 7, 16):
        batch = np.random.default_rng(rows).random((rows, *IMAGE), np.float32)
        for own, direct in zip(on_gpu.run(batch), on_cpu.run(batch), strict=True):
            np.testing.assert_allclose(own, direct, rtol=1e-4, atol=1e-5)

"""The benchmarks measure what they say: their form, their arithmetic, and that no error counts as an answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import bench
import catalogue
import h2load
import http2_load
import onnxruntime_alone
from bed import GRPC, Bed, Effort
from bundles import write_bundle
from children import BenchError
from serving import running_server
from table import Bound, Measured, Table, text
from traffic import VERBS, check, find_model, framed
from vaeserve import tensors
from vaeserve.v1 import vae_pb2, vae_pb2_grpc
from vaeserve_server.graphs import CUDA, CudaOptions

BENCH = Path(__file__).with_name("bench.py")
KEYS = {"workload", "transport", "value", "unit", "baseline", "ratio", "bound", "met", "rounds", "note"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_bundle(folder, "mnist", "1")
    return folder


def test_a_quick_run_writes_rows_that_say_what_they_compare(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench" / "results.json"
    command = [sys.executable, str(BENCH), "--quick", "--models", str(models), "--out", str(out)]
    groups = ["encode-in-flight", "encode-bulk"]
    done = subprocess.run([*command, "--only", *groups], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["model"] == "mnist/1"
    rows = {(row["workload"], row["transport"]): row for row in results["rows"]}
    for row in rows.values():
        assert row.keys() >= KEYS
        assert row["value"] > 0
        assert (row["ratio"] is None) == (row["baseline"] is None)
    ours = rows["encode, 32 in flight", "grpc"]
    echo = rows["encode, 32 in flight", "echo"]
    assert ours["baseline"] == "encode, 32 in flight (echo)"
    assert ours["ratio"] == pytest.approx(ours["value"] / echo["value"])
    assert ours["bound"] == ">= 0.75"
    assert ours["met"] == (ours["ratio"] >= 0.75)
    assert ("encoder, batch 64", "onnxruntime") in rows  # a group brings what it needs
    alone = rows["encode, bulk, grpc, encoder alone", "onnxruntime"]  # and measures again what it compares with
    bulk = rows["encode, bulk", "grpc"]
    assert bulk["ratio"] == pytest.approx(bulk["value"] / alone["value"])
    assert "encode, 32 in flight" in done.stdout


def test_without_a_model_it_says_how_to_get_one(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--quick", "--models", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "`make run`" in done.stderr
    assert "Traceback" not in done.stderr


def test_ratios_are_taken_within_a_round_and_then_their_median() -> None:
    table = Table()
    for ours, limit in ((50.0, 100.0), (9.0, 10.0), (30.0, 40.0)):
        base = Measured("limit", "onnxruntime", limit, "images/s")
        table.add_round([base, Measured("ours", "grpc", ours, "images/s", ("limit", "onnxruntime"), Bound(">=", 0.8))])
    _, row = table.rows()
    assert row["round_ratios"] == [0.5, 0.9, 0.75]
    assert (row["value"], row["ratio"], row["met"]) == (30.0, 0.75, False)
    assert "NOT MET" in text(table.rows())


@pytest.mark.parametrize("generator", ["http2_load", "h2load"])
def test_no_error_counts_as_an_answer(generator: str, models: Path, tmp_path: Path) -> None:
    if generator == "h2load" and not h2load.find():
        pytest.skip("h2load is not installed")
    verb, model, body = VERBS[0], find_model(models, None), tmp_path / "body.bin"
    request = verb.request(model, 1)
    body.write_bytes(framed(request.SerializeToString()))
    with running_server(models) as server, grpc.insecure_channel(server.target) as channel:
        answer = vae_pb2_grpc.VaeServiceStub(channel).Encode(request)
        load = {
            "port": server.server.port,
            "body_file": body,
            "answer_bytes": len(framed(answer.SerializeToString())),
            "in_flight": 4,
            "connections": 2,
            "calls": 40,
            **({"core": None} if generator == "h2load" else {}),
        }
        drive = h2load.closed_loop if generator == "h2load" else http2_load.closed_loop
        assert drive(path=verb.path, **load)["calls_per_s"] > 0
        with pytest.raises(BenchError, match="error"):
            drive(path="/vaeserve.v1.VaeService/None", **load)


def test_the_open_loop_answers_every_call_of_its_schedule(models: Path, tmp_path: Path) -> None:
    verb, model, body = VERBS[1], find_model(models, None), tmp_path / "body.bin"
    request = verb.request(model, 3)
    body.write_bytes(framed(request.SerializeToString()))
    with running_server(models) as server, grpc.insecure_channel(server.target) as channel:
        answer = vae_pb2_grpc.VaeServiceStub(channel).Decode(request).SerializeToString()
        check(verb, model, 3, answer)
        load = {"port": server.server.port, "path": verb.path, "body_file": body, "calls_per_s": 500, "seed": 1}
        times = http2_load.open_loop(**load, answer_bytes=len(framed(answer)), calls=100)
        assert 0 < times["p50"] <= times["p99"] <= times["p99.9"]
        with pytest.raises(BenchError, match="100 of 100"):
            http2_load.open_loop(**load, answer_bytes=1, calls=100)


def test_a_wrong_answer_is_found(models: Path) -> None:
    verb, model = VERBS[0], find_model(models, None)
    mean = verb.expected(model, 2)
    check(verb, model, 2, _encode_answer(mean))
    with pytest.raises(BenchError, match="wrongly"):
        check(verb, model, 2, _encode_answer(mean[::-1]))
    with pytest.raises(BenchError, match="wrongly"):
        check(verb, model, 1, _encode_answer(mean))


def _encode_answer(mean: NDArray[np.float32]) -> bytes:
    return vae_pb2.EncodeResponse(mean=tensors.to_tensor(mean)).SerializeToString()


def test_without_a_gpu_the_gpu_benchmark_says_so(models: Path, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in _usable_providers():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCH), "--device", "cuda", "--quick", "--models", str(models)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0
    assert "there is no GPU to measure here" in done.stdout
    assert not any(tmp_path.iterdir())


def test_the_groups_of_a_gpu_run_on_a_model_of_few_rows(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAESERVE_MAX_ROWS_PER_CALL", "200")
    monkeypatch.setattr(catalogue, "_BULK_ROWS", 600)
    monkeypatch.setattr(catalogue, "_IN_FLIGHT", (1, 8))
    effort = Effort(seconds=0.02, rounds=1, stream_rows=0)
    with Bed(find_model(models, None), models, tmp_path, "cpu", effort) as bed:
        bed.servers = [bed.serve(GRPC)]
        rows = bench.one_round(bed, catalogue._gpu_groups(), 0, 1)
    bulk = {row.workload for row in rows if row.transport == GRPC and "bulk" in row.workload}
    assert "encode, bulk, 128 rows a call" in bulk
    assert "decode, bulk, 128 rows a call, uint8 images" in bulk
    keys = {(row.workload, row.transport) for row in rows}
    assert all(row.baseline in keys for row in rows if row.baseline is not None)
    assert ("start to first answer", GRPC) in keys


def test_onnxruntime_alone_has_the_options_that_the_server_has_on_a_gpu(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Session:
        def __init__(self, graph: Path, options: Any, *, providers: list[Any]) -> None:
            asked.extend(providers)

        def get_providers(self) -> list[str]:
            return [CUDA]

    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    onnxruntime_alone.Alone(find_model(models, None).folder, CUDA, 2)._session("encoder", 1)
    assert asked == [(CUDA, CudaOptions().provider_options())]


def _usable_providers() -> list[str]:
    from vaeserve_server.graphs import Runtime

    return [Runtime("auto").provider]

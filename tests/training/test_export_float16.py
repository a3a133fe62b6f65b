"""Graphs in float16 are the same model rounded: in their own types, measured, refused where they are no such thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from vaeserve.v1 import vae_pb2
from vaeserve_training import bundle, checkpoint, onnx_graphs, parity
from vaeserve_training.__main__ import main
from vaeserve_training.onnx_graphs import DecoderGraph, EncoderGraph, ExportError, HalfPrecision

FILES = (bundle.ENCODER_FLOAT16_FILE, bundle.DECODER_FLOAT16_FILE)


@pytest.fixture(scope="module")
def folder(float16_models_dir: Path) -> Path:
    return float16_models_dir / "mnist" / "1"


@pytest.mark.parametrize("file", FILES)
def test_weights_are_float16_and_what_goes_in_and_out_is_float32(file: str, folder: Path) -> None:
    model = onnx.load_model(folder / file)
    onnx.checker.check_model(model, full_check=True)
    ports = [*model.graph.input, *model.graph.output]
    assert {port.type.tensor_type.elem_type for port in ports} == {TensorProto.FLOAT}
    weights = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > 1]
    assert sum(np.prod(tensor.dims) for tensor in weights if tensor.data_type == TensorProto.FLOAT16) > 100_000
    assert not [tensor.name for tensor in weights if tensor.data_type == TensorProto.FLOAT]
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        bundle.DIGEST_KEY: bundle.read_card(folder).digest
    }


def test_they_change_neither_the_other_graphs_nor_the_digest(folder: Path, bundle_dir: Path) -> None:
    with_float16, without = bundle.read_card(folder), bundle.read_card(bundle_dir)
    assert with_float16.digest == without.digest
    assert with_float16.graphs == without.graphs
    assert not without.float16_graphs
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(path.name for path in bundle_dir.iterdir()), *FILES]
    )


def test_the_card_says_how_far_they_are_from_the_model(folder: Path, test_images: NDArray[np.uint8]) -> None:
    card = bundle.read_card(folder)
    roles = [graph.role for graph in card.float16_graphs]
    assert roles == [vae_pb2.GRAPH_ROLE_ENCODER, vae_pb2.GRAPH_ROLE_DECODER]
    for graph in card.float16_graphs:
        (measured,) = [entry for entry in graph.parity if entry.provider == parity.CPU]
        assert 1e-5 < measured.max_abs_error < parity.FLOAT16_TOLERANCE
        assert list(measured.batch_sizes) == list(parity.BATCH_SIZES)
    image = (test_images[:16] / 255).astype(np.float32)
    exact, rounded = (
        parity.onnxruntime.InferenceSession(folder / file, providers=[parity.CPU]).run(None, {"image": image})[0]
        for file in (bundle.ENCODER_FILE, bundle.ENCODER_FLOAT16_FILE)
    )
    largest = 2 * card.float16_graphs[0].parity[0].max_abs_error
    assert 0 < np.abs(exact - rounded).max() < largest


def test_what_is_further_away_than_rounding_explains_is_refused(
    folder: Path, checkpoint_dir: Path, test_images: NDArray[np.uint8]
) -> None:
    encoder = checkpoint.load(checkpoint_dir).vae.encoder
    with torch.no_grad():
        encoder.head.bias += 0.1
    inputs = parity.image_inputs(test_images)
    content = (folder / bundle.ENCODER_FLOAT16_FILE).read_bytes()
    with pytest.raises(ExportError, match=r"encoder\.fp16\.onnx on .*; allowed are 0\.02 \* \(1 \+ \|torch\|\)"):
        parity.measure(FILES[0], content, EncoderGraph(encoder), inputs, parity.FLOAT16_TOLERANCE)


def test_the_command_publishes_them_and_says_how_exact_they_are(
    checkpoint_dir: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ready = {file: (folder / file).read_bytes() for file in (bundle.ENCODER_FILE, bundle.DECODER_FILE, *FILES)}

    def encoder(module: EncoderGraph, *_: object) -> bytes:
        return ready[FILES[0] if isinstance(module.encoder, HalfPrecision) else bundle.ENCODER_FILE]

    def decoder(module: DecoderGraph, *_: object) -> bytes:
        return ready[FILES[1] if isinstance(module.decoder, HalfPrecision) else bundle.DECODER_FILE]

    monkeypatch.setattr(onnx_graphs, "build_encoder", encoder)  # spares the seconds that PyTorch's exporter takes
    monkeypatch.setattr(onnx_graphs, "build_decoder", decoder)
    measured = vae_pb2.Parity(provider=parity.CPU, max_abs_error=0.0025, batch_sizes=parity.BATCH_SIZES)
    monkeypatch.setattr(parity, "measure", lambda *_: [measured])  # and those of float16 on a CPU
    flags = ["--run-dir", str(checkpoint_dir), "--models", str(tmp_path), "--name", "digits", "--no-evaluate"]
    assert main(["export", *flags, "--precision", "fp16"]) == 0
    said = capsys.readouterr().out
    exact = f"on {parity.CPU}: within 2.5e-03 of PyTorch at batch sizes 1, 2, 7, 64"
    assert all(f"{file} {exact}" in said for file in FILES)
    assert all((tmp_path / "digits" / "1" / file).is_file() for file in FILES)

"""The published graphs equal the model, are the same bytes each time, and carry nothing of the machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf.message import Message
from numpy.typing import NDArray
from torch import nn

from known_graphs import reuse_graphs
from vaeserve.v1 import vae_pb2
from vaeserve_training import bundle, checkpoint, onnx_graphs, parity
from vaeserve_training.__main__ import main
from vaeserve_training.bundle import BundleError
from vaeserve_training.checkpoint import Checkpoint, CheckpointError
from vaeserve_training.config import preset
from vaeserve_training.data import load
from vaeserve_training.export import export
from vaeserve_training.fit import fit
from vaeserve_training.onnx_graphs import DecoderGraph, ExportError
from vaeserve_training.report import Report

MNIST_SUBSET = Path(__file__).parents[1] / "data" / "mnist_subset.npz"
GRAPH_FILES = (bundle.ENCODER_FILE, bundle.DECODER_FILE)
EXPORT_IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
sys.path.append(sys.argv[3])
from known_graphs import operators_read_once
from vaeserve_training import parity
from vaeserve_training.export import export
parity.measure = lambda *_: []
with operators_read_once():
    export(Path(sys.argv[1]), Path(sys.argv[2]), name="mnist", float16=True)
"""


@pytest.fixture(scope="module")
def model(checkpoint_dir: Path) -> Checkpoint:
    return checkpoint.load(checkpoint_dir)


@pytest.fixture(scope="module")
def card(bundle_dir: Path) -> vae_pb2.ModelCard:
    return bundle.read_card(bundle_dir)


@pytest.fixture(params=GRAPH_FILES)
def graph(request: pytest.FixtureRequest, bundle_dir: Path) -> onnx.ModelProto:
    return onnx.load_model(bundle_dir / request.param)


def session(path: Path) -> Any:
    return parity.onnxruntime.InferenceSession(path, providers=[parity.CPU])


def names(values: list[Any]) -> list[str]:
    return [value.name for value in values]


def messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                yield from messages(part)


@pytest.fixture
def ready_graphs(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that PyTorch's exporter takes, where a test is about something else."""
    reuse_graphs(bundle_dir, monkeypatch)
    monkeypatch.setattr(parity, "measure", lambda *_: [])


# What is published


def test_the_graphs_take_and_give_what_the_bundle_promises(bundle_dir: Path) -> None:
    encoder, decoder = session(bundle_dir / bundle.ENCODER_FILE), session(bundle_dir / bundle.DECODER_FILE)
    assert (names(encoder.get_inputs()), names(encoder.get_outputs())) == (["image"], ["mean", "stddev"])
    assert (names(decoder.get_inputs()), names(decoder.get_outputs())) == (["latent"], ["image"])
    assert encoder.get_inputs()[0].shape == ["batch", 1, 28, 28]
    assert [value.shape for value in encoder.get_outputs()] == [["batch", 20]] * 2
    assert decoder.get_inputs()[0].shape == ["batch", 20]
    assert decoder.get_outputs()[0].shape == ["batch", 1, 28, 28]


@pytest.mark.parametrize("rows", [1, 3, 65])
def test_the_graphs_compute_the_model_at_sizes_that_the_export_did_not_try(
    rows: int, bundle_dir: Path, model: Checkpoint, test_images: NDArray[np.uint8]
) -> None:
    images = (test_images[:rows] / 255).astype(np.float32)
    mean, stddev = session(bundle_dir / bundle.ENCODER_FILE).run(None, {"image": images})
    (decoded,) = session(bundle_dir / bundle.DECODER_FILE).run(None, {"latent": mean})
    with torch.no_grad():
        expected_mean, log_variance = model.vae.encoder(torch.from_numpy(images))
        expected_image = model.vae.decoder(torch.from_numpy(mean))
    assert mean == pytest.approx(expected_mean.numpy(), rel=1e-5, abs=1e-5)
    assert stddev == pytest.approx((log_variance / 2).exp().numpy(), rel=1e-5, abs=1e-5)
    assert decoded == pytest.approx(expected_image.numpy(), rel=1e-5, abs=1e-5)


def test_any_finite_latent_gives_an_image_in_range(bundle_dir: Path) -> None:
    decoder = session(bundle_dir / bundle.DECODER_FILE)
    extreme = np.full((4, 20), np.finfo(np.float32).max, dtype=np.float32) * np.float32([[1], [-1], [1], [-1]])
    extreme[2:, ::2] *= -1
    (images,) = decoder.run(None, {"latent": extreme})
    assert np.isfinite(images).all()
    assert (images.min(), images.max()) >= (0, 0)
    assert images.max() <= 1


def test_the_card_describes_the_model_and_its_graphs(
    card: vae_pb2.ModelCard, model: Checkpoint, bundle_dir: Path
) -> None:
    assert (card.schema_version, card.name, card.version) == (1, "mnist", "1")
    assert (list(card.image_shape), list(card.latent_shape)) == ([1, 28, 28], [20])
    assert card.likelihood == vae_pb2.LIKELIHOOD_BERNOULLI
    assert card.encoder_input == vae_pb2.ENCODER_INPUT_BINARISED
    assert card.beta == 1
    assert not card.HasField("sigma")
    assert (card.dataset.name, card.dataset.train_images, card.dataset.test_images) == ("arrays", 1024, 256)
    assert card.dataset.sha256 == model.dataset.sha256
    assert {"torch", "onnx", "onnxscript", "onnxruntime", "python", "vaeserve"} <= card.tool_versions.keys()
    assert card.created.seconds > 0
    assert [(graph.role, graph.file, graph.opset) for graph in card.graphs] == [
        (vae_pb2.GRAPH_ROLE_ENCODER, "encoder.onnx", onnx_graphs.OPSET),
        (vae_pb2.GRAPH_ROLE_DECODER, "decoder.onnx", onnx_graphs.OPSET),
    ]


def test_the_card_says_how_exact_the_graphs_are(card: vae_pb2.ModelCard) -> None:
    for graph in card.graphs:
        measured = next(entry for entry in graph.parity if entry.provider == parity.CPU)
        assert list(measured.batch_sizes) == [1, 2, 7, 64]
        assert 0 < measured.max_abs_error < 1e-3
        assert 0 < measured.max_rel_error < 1e-2
        assert 0 <= measured.max_batch_error < 1e-5


def test_the_card_keeps_the_configuration_but_not_where_the_data_lay(
    card: vae_pb2.ModelCard, model: Checkpoint, bundle_dir: Path
) -> None:
    config = json.loads(card.training_config_json)
    assert config["optimiser"] == model.config.optimiser.model_dump(mode="json")
    assert config["data"]["path"] is None
    assert str(model.config.data.path) not in (bundle_dir / bundle.CARD_FILE).read_text()


@pytest.mark.usefixtures("ready_graphs")
def test_held_out_figures_are_the_caller_s(checkpoint_dir: Path, model: Checkpoint, tmp_path: Path) -> None:
    report = Report(
        [vae_pb2.Evaluation(protocol="as told", images=256, neg_elbo_nats=100.0)],
        vae_pb2.LatentStatistics(mean=[0.5] * 20),
        model.weights_sha256,
    )
    published = bundle.read_card(export(checkpoint_dir, tmp_path, name="mnist", evaluation=report))
    assert list(published.evaluations) == report.evaluations
    assert published.latent_statistics == report.latent_statistics


@pytest.mark.usefixtures("ready_graphs")
@pytest.mark.parametrize("likelihood", ["gaussian", "mse"])
def test_the_card_names_the_likelihood_and_what_the_encoder_was_trained_to_see(likelihood: str, tmp_path: Path) -> None:
    config = preset("mnist").with_changes(
        data={"dataset": "arrays", "path": MNIST_SUBSET, "limit_train": 64, "limit_test": 8},
        objective={"likelihood": likelihood, "beta": 0.5},
        optimiser={"epochs": 1},
        run={"monitor_images": 0},
    )
    trained = fit(config, tmp_path / "run")
    published = bundle.read_card(export(trained, tmp_path / "models", name="mnist"))
    assert published.likelihood == vae_pb2.Likelihood.Value(f"LIKELIHOOD_{likelihood.upper()}")
    assert published.encoder_input == vae_pb2.ENCODER_INPUT_GREY
    assert published.beta == 0.5
    assert published.HasField("sigma") == (likelihood == "gaussian")
    assert published.sigma == (checkpoint.load(trained).vae.sigma or 0)


# What is in the graphs


def test_a_graph_is_valid_with_weights_inside_and_a_fixed_opset(graph: onnx.ModelProto) -> None:
    onnx.checker.check_model(graph, full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", onnx_graphs.OPSET)]
    weights = graph.graph.initializer
    assert sum(np.prod(weight.dims) for weight in weights) > 100_000
    assert all(weight.data_location == onnx.TensorProto.DEFAULT and not weight.external_data for weight in weights)


def test_a_graph_draws_no_random_numbers(graph: onnx.ModelProto) -> None:
    operators = {node.op_type for node in graph.graph.node}
    assert {"Gemm"} <= operators
    assert not {name for name in operators if re.search("Random|Bernoulli|Multinomial|Dropout", name)}


def test_a_graph_says_nothing_but_its_digest(graph: onnx.ModelProto, card: vae_pb2.ModelCard) -> None:
    assert {entry.key: entry.value for entry in graph.metadata_props} == {bundle.DIGEST_KEY: card.digest}
    del graph.metadata_props[:]
    for message in messages(graph):
        said = [field.name for field, _ in message.ListFields() if field.name in {"metadata_props", "doc_string"}]
        assert not said, f"{type(message).__name__} has {said}"


@pytest.mark.parametrize("file", GRAPH_FILES)
def test_no_path_and_no_trace_of_the_machine_is_in_the_bytes(file: str, bundle_dir: Path) -> None:
    content = (bundle_dir / file).read_bytes()
    texts = re.findall(rb"[\x20-\x7e]{5,}", content)  # any longer text, weights by chance included
    folders = {
        os.fsencode(folder) for folder in (Path.home(), Path.cwd(), Path(torch.__file__).parent, Path(sys.prefix))
    }
    suspicious = [
        rb'File "',
        rb"\.py\b",
        rb"Traceback",
        rb"site-packages",
        rb"stack_trace",
        *map(re.escape, folders - {b"/"}),
    ]
    assert not [text for text in texts if re.search(b"|".join(suspicious), text)]


# The same each time


def test_another_process_exports_the_same_bytes(
    checkpoint_dir: Path, bundle_dir: Path, float16_models_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", EXPORT_IN_ANOTHER_PROCESS, checkpoint_dir, tmp_path, Path(__file__).parent]
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": hash_seed}, timeout=150, check=True)
    assert bundle.read_card(tmp_path / "mnist" / "1").digest == bundle.read_card(bundle_dir).digest
    for file in GRAPH_FILES:
        assert (tmp_path / "mnist" / "1" / file).read_bytes() == (bundle_dir / file).read_bytes()
    for file in (bundle.ENCODER_FLOAT16_FILE, bundle.DECODER_FLOAT16_FILE):
        assert (tmp_path / "mnist" / "1" / file).read_bytes() == (float16_models_dir / "mnist/1" / file).read_bytes()


def test_how_the_first_weights_were_drawn_is_no_part_of_what_a_bundle_is(
    checkpoint_dir: Path, card: vae_pb2.ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(checkpoint.resolve(checkpoint_dir), tmp_path / "checkpoint"))
    config = checkpoint.load(copy).config.with_changes(model={"initialisation": "glorot"})
    (copy / checkpoint.CONFIG).write_text(config.to_json())
    built = []
    for name in ("build_encoder", "build_decoder"):
        monkeypatch.setattr(onnx_graphs, name, lambda *given: built.append(given) or b"a graph")
    monkeypatch.setattr(parity, "measure", lambda *_: [])
    published = bundle.read_card(export(copy, tmp_path / "models", name="mnist"))
    assert published.digest == card.digest
    own = checkpoint.load(checkpoint_dir).vae
    for (graph, _, digest), part in zip(built, (own.encoder, own.decoder), strict=True):
        assert digest == card.digest
        assert repr(graph) == repr(type(graph)(part))
        for name, tensor in type(graph)(part).state_dict().items():
            assert torch.equal(graph.state_dict()[name], tensor)


# What is refused


def fail(*_: object, **__: object) -> None:
    raise ExportError("it does not work")


@pytest.mark.usefixtures("ready_graphs")
@pytest.mark.parametrize("failing", ["build_encoder", "build_decoder", "the first proof", "the second proof"])
def test_an_export_that_fails_at_any_step_publishes_nothing(
    failing: str, checkpoint_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if failing in {"build_encoder", "build_decoder"}:
        monkeypatch.setattr(onnx_graphs, failing, fail)
    else:
        file = bundle.ENCODER_FILE if failing == "the first proof" else bundle.DECODER_FILE
        monkeypatch.setattr(parity, "measure", lambda given, *_: fail() if given == file else [])
    with pytest.raises(ExportError, match="it does not work"):
        export(checkpoint_dir, tmp_path / "models", name="mnist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ready_graphs")
def test_names_and_versions_are_checked_first(checkpoint_dir: Path, models_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="use letters, digits"):
        export(tmp_path / "no checkpoint", tmp_path / "models", name="../mnist")
    with pytest.raises(BundleError, match="mnist/1 exists, and a published version is never changed"):
        export(tmp_path / "no checkpoint", models_dir, name="mnist", version=1)
    with pytest.raises(CheckpointError, match="no checkpoint is no checkpoint"):
        export(tmp_path / "no checkpoint", tmp_path / "models", name="mnist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ready_graphs")
def test_figures_of_other_weights_are_refused(checkpoint_dir: Path, tmp_path: Path) -> None:
    other = Report([], vae_pb2.LatentStatistics(), "f" * 64)
    with pytest.raises(ExportError, match="the evaluation is of other weights"):
        export(checkpoint_dir, tmp_path / "models", name="mnist", evaluation=other)


@pytest.mark.usefixtures("ready_graphs")
def test_another_data_set_than_the_one_trained_on_is_refused(
    checkpoint_dir: Path, model: Checkpoint, tmp_path: Path
) -> None:
    other = replace(load(model.config.data), sha256="f" * 64)
    with pytest.raises(ExportError, match=r"was trained on .*: the data set has changed since"):
        export(checkpoint_dir, tmp_path / "models", name="mnist", data=other)


def test_what_pytorch_cannot_export_is_an_export_error() -> None:
    class Branching(nn.Module):
        def forward(self, latent: torch.Tensor) -> torch.Tensor:
            return latent if latent.sum() > 0 else -latent  # which of them depends on the values

    with pytest.raises(ExportError, match="PyTorch cannot export DecoderGraph"):
        onnx_graphs.build_decoder(DecoderGraph(Branching()), [4], "0" * 64)


# The command


def run_command(*arguments: str | Path) -> int:
    return main(["export", *map(str, arguments)])


@pytest.mark.usefixtures("ready_graphs")
def test_the_command_evaluates_once_and_publishes(
    checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(checkpoint_dir, run_dir / "checkpoints" / checkpoint_dir.name)
    flags = ("--run-dir", run_dir, "--models", tmp_path / "models", "--name", "digits", "--quiet")
    assert run_command(*flags) == 0
    first = bundle.read_card(tmp_path / "models" / "digits" / "1")
    assert f"published {tmp_path / 'models' / 'digits' / '1'}" in capsys.readouterr().out
    assert [entry.images for entry in first.evaluations] == [256, 256]
    assert len(first.latent_statistics.kl_nats) == 20
    report = json.loads((run_dir / "evaluation.json").read_text())
    report["evaluations"][0]["protocol"] = "the one on disk"
    (run_dir / "evaluation.json").write_text(json.dumps(report))
    assert run_command(*flags) == 0
    second = bundle.read_card(tmp_path / "models" / "digits" / "2")
    assert second.evaluations[0].protocol == "the one on disk", "figures of these weights are not computed again"
    report["weights_sha256"] = "f" * 64
    (run_dir / "evaluation.json").write_text(json.dumps(report))
    assert run_command(*flags) == 0
    third = bundle.read_card(tmp_path / "models" / "digits" / "3")
    assert third.evaluations == first.evaluations, "figures of other weights are"


@pytest.mark.usefixtures("ready_graphs")
def test_the_command_can_leave_the_figures_out(checkpoint_dir: Path, tmp_path: Path) -> None:
    assert run_command("--run-dir", checkpoint_dir, "--models", tmp_path, "--name", "mnist", "--no-evaluate") == 0
    assert not bundle.read_card(tmp_path / "mnist" / "1").evaluations


def test_the_command_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--run-dir", tmp_path, "--models", tmp_path / "models", "--name", "bad name") == 1
    error = capsys.readouterr().err
    assert error.startswith("vaeserve-train export: model name 'bad name': use letters")
    assert error.count("\n") == 1

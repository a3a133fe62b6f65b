"""The fitted prior: a density, its exact inverse, better than N(0, I) where that is wrong, and served as published."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from known_graphs import reuse_graphs
from runs import tiny_config, tiny_data
from serving import running_server
from vaeserve import Client
from vaeserve.v1 import vae_pb2
from vaeserve_server.noise import standard_normal
from vaeserve_training import bundle, checkpoint, onnx_graphs, parity, prior_fit
from vaeserve_training.__main__ import main
from vaeserve_training.checkpoint import Checkpoint, CheckpointError
from vaeserve_training.compute import cpu_threads
from vaeserve_training.config import ConfigError, PriorConfig
from vaeserve_training.data import load
from vaeserve_training.evaluate import bound, iw_nll
from vaeserve_training.export import export
from vaeserve_training.fit import fit
from vaeserve_training.objectives import Posterior, standard_normal_log_density
from vaeserve_training.onnx_graphs import ExportError
from vaeserve_training.prior import FlowPrior
from vaeserve_training.prior_fit import FittedPrior, fit_flow, fit_prior

QUICK = PriorConfig(couplings=4, hidden=32, steps=300, batch_size=256, learning_rate=3e-3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with cpu_threads(1):
        yield


def random_flow(latent_size: int, seed: int = 0, spread: float = 0.5) -> FlowPrior:
    """A flow whose couplings all do something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = FlowPrior(PriorConfig(couplings=3, hidden=16), latent_size).double().requires_grad_(False)
        for parameter in flow.parameters():
            parameter.normal_(std=spread)
        flow.mean.normal_()
        flow.stddev.uniform_(0.5, 2)
    return flow


@pytest.mark.parametrize("latent_size", [2, 3, 8])
def test_pull_is_the_inverse_of_push_and_knows_its_jacobian(latent_size: int) -> None:
    flow = random_flow(latent_size)
    noise = torch.randn(5, latent_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    latent = flow.push(noise)
    assert not torch.allclose(latent, noise, atol=0.1)
    pulled, log_det = flow.pull(latent)
    torch.testing.assert_close(pulled, noise)
    for row in range(len(noise)):
        jacobian = torch.autograd.functional.jacobian(lambda one: flow.pull(one[None])[0][0], latent[row])
        torch.testing.assert_close(log_det[row], torch.linalg.slogdet(jacobian).logabsdet)


def test_the_density_integrates_to_one() -> None:
    flow = random_flow(2, seed=3, spread=0.3)
    axis = torch.linspace(-25, 25, 801, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)  # (801, 801, 2)
    total = flow.log_density(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=1e-3)


def test_a_fresh_flow_is_the_standard_normal() -> None:
    flow = FlowPrior(PriorConfig(), 6)
    latent = torch.randn(4, 7, 6)
    torch.testing.assert_close(flow.log_density(latent), standard_normal_log_density(latent))


def test_the_graph_clamps_what_no_sample_reaches() -> None:
    flow = random_flow(4).float()
    assert torch.equal(flow(torch.full((1, 4), 1e30)), flow(torch.full((1, 4), 10.0)))
    assert flow(torch.randn(100, 4) * 10).abs().max() <= 10


def test_one_latent_has_no_coupling() -> None:
    with pytest.raises(ConfigError, match="1 latent has no others"):
        FlowPrior(PriorConfig(), 1)


def test_a_fit_finds_a_mixture_that_the_standard_normal_misses() -> None:
    source = torch.Generator().manual_seed(0)
    centres = torch.tensor([[1.5, 0.5], [-1.5, 0.5], [0.0, -1.0]])
    mean = centres[torch.randint(3, (3000,), generator=source)]
    posterior = Posterior(mean, torch.full_like(mean, math.log(0.09)))
    flow = fit_flow(posterior, QUICK)
    latent = centres[torch.randint(3, (4000,), generator=source)] + 0.3 * torch.randn(4000, 2, generator=source)
    each = torch.stack([standard_normal_log_density((latent - one) / 0.3) for one in centres]) - 2 * math.log(0.3)
    entropy = -(each.logsumexp(0) - math.log(3)).mean().item()
    fitted, standard = (
        -density.mean().item() for density in (flow.log_density(latent), standard_normal_log_density(latent))
    )
    assert entropy < fitted < entropy + 0.35
    assert standard > entropy + 0.8
    assert (flow(torch.randn(2000, 2, generator=source)) - centres[:, None]).norm(dim=-1).amin(0).median() < 0.6


@pytest.fixture(scope="module")
def model(checkpoint_dir: Path) -> Checkpoint:
    return checkpoint.load(checkpoint_dir)


@pytest.fixture(scope="module")
def fitted(model: Checkpoint) -> FittedPrior:
    return fit_prior(model, load(model.config.data), QUICK)


def test_the_fit_is_a_function_of_its_seed(model: Checkpoint) -> None:
    data, short = load(model.config.data), QUICK.model_copy(update={"steps": 20})
    first, again, other = (fit_prior(model, data, short.model_copy(update={"seed": seed})).sha256 for seed in (0, 0, 1))
    assert first == again != other


def test_held_out_figures_are_better_under_the_fitted_prior(fitted: FittedPrior, model: Checkpoint) -> None:
    images = load(model.config.data).test
    standard, learned = (bound(model.vae, images, "bernoulli", prior=prior) for prior in (None, fitted.flow))
    assert torch.equal(standard.distortion, learned.distortion)
    assert learned.rate.mean() < standard.rate.mean() - 0.2
    nll = iw_nll(model.vae, images[:64], "bernoulli", k=20, prior=fitted.flow).mean()
    assert nll < (learned.distortion + learned.rate)[:64].mean()


def test_under_the_standard_normal_as_a_prior_the_figures_are_the_closed_form_s(model: Checkpoint) -> None:
    images = load(model.config.data).test
    fresh = FlowPrior(PriorConfig(), model.vae.latent_size)
    closed, sampled = (bound(model.vae, images, "bernoulli", prior=prior) for prior in (None, fresh))
    assert float(sampled.rate.mean()) == pytest.approx(float(closed.rate.mean()), abs=0.5)
    known, found = (iw_nll(model.vae, images[:8], "bernoulli", k=3, prior=prior) for prior in (None, fresh))
    np.testing.assert_allclose(found, known, rtol=1e-5)


def test_a_prior_survives_its_file(fitted: FittedPrior, tmp_path: Path) -> None:
    prior_fit.save(fitted, tmp_path / "prior.safetensors")
    found = prior_fit.load(tmp_path / "prior.safetensors")
    assert (found.config, found.weights_sha256, found.sha256) == (QUICK, fitted.weights_sha256, fitted.sha256)
    latent: Tensor = torch.randn(3, fitted.flow.latent_size)
    assert torch.equal(found.flow.log_density(latent), fitted.flow.log_density(latent))


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", "weights"])
def test_another_file_is_no_prior(content: bytes | str | None, checkpoint_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    if content == "weights":
        shutil.copy(checkpoint_dir / checkpoint.WEIGHTS, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"prior\.safetensors"):
        prior_fit.load(path)


def test_a_prior_is_used_with_its_own_weights_only(fitted: FittedPrior, model: Checkpoint, tmp_path: Path) -> None:
    other = replace(fitted, weights_sha256="f" * 64)
    prior_fit.save(other, prior_fit.default_path(tmp_path / "epoch-0003"))
    with pytest.raises(CheckpointError, match="was fitted to other weights"):
        prior_fit.load_for(replace(model, path=tmp_path / "epoch-0003"))
    with pytest.raises(ExportError, match="was fitted to other weights"):
        export(model.path, tmp_path / "models", name="mnist", prior=other)


# What is published and served


@pytest.fixture(scope="module")
def small(model: Checkpoint) -> FittedPrior:
    """A prior with few couplings: PyTorch's exporter takes a second for each."""
    return fit_prior(model, load(model.config.data), QUICK.model_copy(update={"couplings": 2, "steps": 100}))


@pytest.fixture(scope="module")
def published(
    small: FittedPrior, model: Checkpoint, bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        reuse_graphs(bundle_dir, patched)
        return export(model.path, tmp_path_factory.mktemp("models"), name="mnist", prior=small)


def test_the_card_lists_a_third_graph_under_another_digest(published: Path, bundle_dir: Path) -> None:
    card = bundle.read_card(published)
    assert [(graph.role, graph.file) for graph in card.graphs][2:] == [(vae_pb2.GRAPH_ROLE_PRIOR, "prior.onnx")]
    assert card.digest != bundle.read_card(bundle_dir).digest
    measured = next(entry for entry in card.graphs[2].parity if entry.provider == parity.CPU)
    assert list(measured.batch_sizes) == [1, 2, 7, 64]
    assert 0 < measured.max_abs_error < 1e-4
    for graph in card.graphs:
        content = onnx.load_model(published / graph.file)
        assert {entry.key: entry.value for entry in content.metadata_props} == {bundle.DIGEST_KEY: card.digest}
        assert not any(node.doc_string or node.metadata_props for node in content.graph.node)
        assert not any("Random" in node.op_type for node in content.graph.node)


def test_the_same_prior_gives_the_same_bytes(
    small: FittedPrior, model: Checkpoint, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reuse_graphs(published, monkeypatch)
    monkeypatch.setattr(parity, "measure", lambda *_: [])
    again = export(model.path, tmp_path, name="mnist", prior=small)
    assert (again / bundle.PRIOR_FILE).read_bytes() == (published / bundle.PRIOR_FILE).read_bytes()


def test_the_server_samples_from_the_published_prior(published: Path) -> None:
    with running_server(published.parents[1]) as server, Client(server.target) as client:
        served = client.sample(70, seed=7, prior="fitted", temperature=0.8)
        standard = client.sample(70, seed=7, temperature=0.8)
        first = client.sample(3, seed=7, prior="fitted", temperature=0.8)
    sessions = {
        file: parity.onnxruntime.InferenceSession(published / file, providers=[parity.CPU])
        for file in (bundle.PRIOR_FILE, bundle.DECODER_FILE)
    }
    noise = standard_normal(7, 0, 70, 20) * np.float32(0.8)
    (latents,) = sessions[bundle.PRIOR_FILE].run(None, {"noise": noise})
    (images,) = sessions[bundle.DECODER_FILE].run(None, {"latent": latents})
    np.testing.assert_allclose(served.latents, latents, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(served.images, images, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first.images, images[:3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(standard.latents, noise, rtol=1e-6)
    assert np.abs(served.latents - standard.latents).mean() > 0.05


# The commands


def test_the_commands_fit_evaluate_and_export_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", train_images=tiny_data().train[:, 0], test_images=tiny_data().test[:, 0])
    fit(tiny_config(data={"dataset": "arrays", "path": Path("images.npz")}), Path("run"))
    assert main(["fit-prior", "--run-dir", "run", "--prior.steps", "30", "--prior.hidden", "8", "--quiet"]) == 0
    assert "wrote run/prior.safetensors" in capsys.readouterr().out
    assert main(["evaluate", "--run-dir", "run", "--iw-samples", "2", "--images", "20", "--quiet"]) == 0
    entries = json.loads(Path("run/evaluation.json").read_text())["evaluations"]
    assert [entry["images"] for entry in entries] == [20, 20, 20]
    assert all("the first 20 of 30 test images" in entry["protocol"] for entry in entries)
    assert "prior: the fitted one" in entries[2]["protocol"]
    assert "rate_nats" not in entries[2]
    assert {"neg_elbo_nats", "distortion_nats", "iw_nll_nats"} <= entries[2].keys()
    for role in ("encoder", "decoder", "prior"):  # what the exporter makes of them is asked above
        monkeypatch.setattr(onnx_graphs, f"build_{role}", lambda *_, role=role: role.encode())
    monkeypatch.setattr(parity, "measure", lambda *_: [])
    assert main(["export", "--run-dir", "run", "--name", "tiny", "--quiet"]) == 0
    assert main(["export", "--run-dir", "run", "--name", "tiny", "--no-prior", "--quiet"]) == 0
    with_prior, without = (bundle.read_card(Path("models/tiny") / version) for version in "12")
    assert (len(with_prior.graphs), len(without.graphs)) == (3, 2)
    assert with_prior.evaluations[0].iw_samples == 2  # the run's own report
    assert len(without.evaluations) == 2

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import json_format
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from linear_gaussian import LinearDecoder, normal
from runs import tiny_config, tiny_data
from vaeserve.v1 import vae_pb2
from vaeserve_training import checkpoint, fid, objectives, report
from vaeserve_training.config import DataConfig, PriorConfig
from vaeserve_training.data import load
from vaeserve_training.evaluate import Bound, bound, evaluate, iw_nll, latent_statistics
from vaeserve_training.fit import fit
from vaeserve_training.models import Vae, build
from vaeserve_training.objectives import Posterior
from vaeserve_training.prior import FlowPrior
from vaeserve_training.randomness import Stream, image_noise
from vaeserve_training.report import EvaluationError, Report

MNIST_SUBSET = Path(__file__).parents[1] / "data" / "mnist_subset.npz"


@pytest.fixture(scope="module")
def trained(checkpoint_dir: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(checkpoint_dir)


@pytest.fixture(scope="module")
def digits(trained: checkpoint.Checkpoint) -> np.ndarray:
    return load(trained.config.data).test[:100]


def test_evaluation_is_deterministic_and_keyed_by_the_seed(trained: checkpoint.Checkpoint) -> None:
    data = load(trained.config.data)
    first, second = (evaluate(trained.vae, data, "bernoulli", iw_samples=2) for _ in range(2))
    assert first.to_json() == second.to_json()
    other = evaluate(trained.vae, data, "bernoulli", seed=1)
    assert other.evaluations[0].neg_elbo_nats != first.evaluations[0].neg_elbo_nats
    assert other.evaluations[0].neg_elbo_nats == pytest.approx(first.evaluations[0].neg_elbo_nats, rel=0.02)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_figures_do_not_depend_on_the_batch_size(
    trained: checkpoint.Checkpoint, digits: np.ndarray, batch_size: int
) -> None:
    expected = bound(trained.vae, digits, "bernoulli")
    found = bound(trained.vae, digits, "bernoulli", batch_size=batch_size)
    torch.testing.assert_close(found.distortion, expected.distortion, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.rate, expected.rate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 100, 100_000])
def test_the_importance_weighted_nll_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    vae, images = build(tiny_config()), tiny_data().train
    expected = iw_nll(vae, images, "bernoulli", k=70)
    assert len(expected) == 100
    np.testing.assert_allclose(iw_nll(vae, images, "bernoulli", k=70, batch_size=batch_size), expected, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100])
def test_no_more_images_are_decoded_at_once_than_the_batch_size(batch_size: int) -> None:
    vae, images = build(tiny_config()), tiny_data().train
    decoded: list[int] = []
    vae.decoder.body.register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0])))
    told: list[int] = []
    iw_nll(vae, images, "bernoulli", k=70, batch_size=batch_size, advance=told.append)
    assert max(decoded) <= batch_size
    assert sum(decoded) == sum(told) == 70 * len(images)


def test_the_first_images_figures_do_not_depend_on_how_many_follow(
    trained: checkpoint.Checkpoint, digits: np.ndarray
) -> None:
    some, more = (bound(trained.vae, digits[:count], "bernoulli") for count in (10, 90))
    torch.testing.assert_close(more.distortion[:10], some.distortion, rtol=1e-5, atol=1e-4)


def test_more_importance_samples_give_a_lower_nll_below_the_bound(
    trained: checkpoint.Checkpoint, digits: np.ndarray
) -> None:
    terms = bound(trained.vae, digits, "bernoulli")
    one, some, many = (iw_nll(trained.vae, digits, "bernoulli", k=k).mean() for k in (1, 5, 25))
    assert many < some < terms.neg_elbo
    # k = 1 is the bound with another draw of the posterior noise and a sampled rate.
    assert one == pytest.approx(terms.neg_elbo, rel=0.02)


class Encoder(nn.Module):
    """The exact posterior of a linear Gaussian model with orthogonal weights, a little too wide."""

    latent_size = 2

    def __init__(self, decoder: LinearDecoder, sigma: float) -> None:
        super().__init__()
        weight = decoder.weight.detach()
        precision = 1 + weight.square().sum(0) / sigma**2
        self.matrix = weight / sigma**2 / precision
        self.offset, self.log_variance = decoder.offset, 0.5 - precision.log()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean = (image.flatten(1) - self.offset) @ self.matrix
        return mean, self.log_variance.expand_as(mean)


def test_the_importance_weighted_nll_meets_the_closed_form_of_a_linear_model() -> None:
    sigma, shape = 0.2, (1, 2, 3)
    basis, _ = torch.linalg.qr(normal(6, 2, seed=5))
    weight = (basis * torch.tensor([0.3, 0.1])).float()
    decoder = LinearDecoder(weight, torch.full((6,), 0.5), shape)
    vae = Vae(Encoder(decoder, sigma), decoder, torch.tensor(math.log(sigma)))
    pixels = np.random.default_rng(0).integers(0, 256, (100, *shape), dtype=np.uint8)
    targets = (torch.from_numpy(pixels) + image_noise(0, Stream.OBSERVATION, 0, 100, shape)) / 256
    marginal = MultivariateNormal(decoder.offset, weight @ weight.T + sigma**2 * torch.eye(6))
    exact = -marginal.log_prob(targets.flatten(1)).numpy()
    found = iw_nll(vae, pixels, "gaussian", k=1000)
    np.testing.assert_allclose(found, exact, atol=0.1)
    assert found.mean() == pytest.approx(exact.mean(), abs=0.01)
    assert bound(vae, pixels, "gaussian").neg_elbo > exact.mean() + 0.05


def test_grey_input_is_judged_by_the_same_binarised_targets(trained: checkpoint.Checkpoint) -> None:
    binarised, grey = evaluate(trained.vae, load(trained.config.data), "bernoulli").evaluations
    assert binarised.encoder_input == vae_pb2.ENCODER_INPUT_BINARISED
    assert grey.encoder_input == vae_pb2.ENCODER_INPUT_GREY
    assert grey.neg_elbo_nats == pytest.approx(binarised.neg_elbo_nats, rel=0.05)
    assert grey.neg_elbo_nats != binarised.neg_elbo_nats
    assert "encoder input: the same binarised image" in binarised.protocol
    assert "encoder input: grey intensities, targets binarised" in grey.protocol


def test_a_blind_encoder_gets_the_same_figure_from_grey_and_binarised_input(
    trained: checkpoint.Checkpoint, digits: np.ndarray
) -> None:
    vae = build(trained.config).eval()
    with torch.no_grad():
        vae.encoder.head.weight.zero_()
    binarised, grey = (bound(vae, digits, "bernoulli", grey_input=grey_input) for grey_input in (False, True))
    assert torch.equal(binarised.distortion, grey.distortion)


def test_the_terms_of_a_report_add_up_and_name_their_protocol(trained: checkpoint.Checkpoint) -> None:
    entry = evaluate(trained.vae, load(trained.config.data), "bernoulli", seed=5, iw_samples=3).evaluations[0]
    assert entry.neg_elbo_nats == pytest.approx(entry.distortion_nats + entry.rate_nats)
    assert entry.images == 256
    assert entry.iw_samples == 3
    assert entry.iw_nll_nats < entry.neg_elbo_nats
    assert entry.protocol == (
        "256 test images of arrays; dynamic binarisation, one Bernoulli sample per image, seed 5; encoder input: the "
        "same binarised image; 1 posterior sample per image, seed 5; importance-weighted NLL with k = 3"
    )
    assert not entry.HasField("loss")
    assert not entry.HasField("bits_per_dim")


def test_static_binarisation_is_its_own_protocol_with_one_line(trained: checkpoint.Checkpoint) -> None:
    data = load(trained.config.data)
    static = replace(data, test=((data.test > 127) * 255).astype(np.uint8), binarised=True)
    (entry,) = evaluate(trained.vae, static, "bernoulli").evaluations
    assert entry.encoder_input == vae_pb2.ENCODER_INPUT_BINARISED
    assert "static binarisation" in entry.protocol
    assert "dynamic" not in entry.protocol


def test_active_units_are_the_latents_whose_mean_varies() -> None:
    images, spread = 4000, torch.tensor([0.0, 0.05, 0.15, 1.0], dtype=torch.float64)
    mean = 3 + spread * normal(images, 4)
    zeros = torch.zeros(images, dtype=torch.float64)
    terms = Bound(zeros, zeros, Posterior(mean, torch.zeros(images, 4, dtype=torch.float64)))
    assert terms.active_units == 2


def test_latent_statistics_describe_the_aggregate_posterior() -> None:
    mean = torch.tensor([1.0, -2.0]) + torch.tensor([0.5, 0.0]) * normal(50_000, 2)
    log_variance = torch.log(torch.tensor([0.04, 1.0], dtype=torch.float64)).expand(50_000, 2)
    zeros = torch.zeros(50_000, dtype=torch.float64)
    statistics = latent_statistics(Bound(zeros, zeros, Posterior(mean, log_variance)))
    sampled = objectives.reparameterize(mean, log_variance, normal(50_000, 2, seed=1))
    np.testing.assert_allclose(statistics.mean, sampled.mean(0), atol=0.02)
    np.testing.assert_allclose(statistics.stddev, sampled.std(0), atol=0.02)
    np.testing.assert_allclose(statistics.mean_posterior_stddev, [0.2, 1.0], rtol=1e-6)
    # KL of a Gaussian with fixed variance, averaged over its mean: 0.5 (E[mean^2] + variance - 1 - log variance).
    expected = [0.5 * (1 + 0.25 + 0.04 - 1 - math.log(0.04)), 0.5 * 4]
    np.testing.assert_allclose(statistics.kl_nats, expected, rtol=0.01)


def test_the_latents_kl_sums_to_the_rate(trained: checkpoint.Checkpoint) -> None:
    found = evaluate(trained.vae, load(trained.config.data), "bernoulli")
    assert sum(found.latent_statistics.kl_nats) == pytest.approx(found.evaluations[0].rate_nats, rel=1e-5)
    assert len(found.latent_statistics.stddev) == trained.config.model.latent_size


def test_bits_per_dimension_price_the_uint8_image(tmp_path: Path) -> None:
    config = tiny_config(objective={"likelihood": "gaussian"})
    vae = checkpoint.load(fit(config, tmp_path, data=tiny_data())).vae
    (entry,) = evaluate(vae, tiny_data(), "gaussian").evaluations
    # The density on 0..1 is the density on 0..256 times 256, for each of 16 pixels.
    assert entry.bits_per_dim == pytest.approx((entry.neg_elbo_nats + 16 * math.log(256)) / 16 / math.log(2))
    assert 5 < entry.bits_per_dim < 9  # uniform pixels cost 8
    assert entry.encoder_input == vae_pb2.ENCODER_INPUT_GREY
    assert "uniform dequantisation" in entry.protocol


def test_mse_fills_the_loss_and_has_no_likelihood(tmp_path: Path) -> None:
    vae = checkpoint.load(fit(tiny_config(objective={"likelihood": "mse"}), tmp_path, data=tiny_data())).vae
    (entry,) = evaluate(vae, tiny_data(), "mse").evaluations
    assert entry.HasField("loss")
    assert not any(entry.HasField(name) for name in ("neg_elbo_nats", "distortion_nats", "bits_per_dim", "iw_nll_nats"))
    assert "no likelihood" in entry.protocol
    with pytest.raises(EvaluationError, match="no normalised likelihood"):
        evaluate(vae, tiny_data(), "mse", iw_samples=1)


def test_the_mse_posterior_collapses_where_the_bernoulli_one_does_not(
    trained: checkpoint.Checkpoint, tmp_path: Path
) -> None:
    data = load(trained.config.data)
    config = trained.config.with_changes(
        data={"limit_train": 256},
        model={"channels": (), "hidden": (64,)},
        objective={"likelihood": "mse"},
        optimiser={"epochs": 10, "batch_size": 32, "ema_decay": 0.0},
    )
    collapsed = evaluate(checkpoint.load(fit(config, tmp_path)).vae, data, "mse").evaluations[0]
    assert collapsed.active_units == 0
    assert collapsed.rate_nats < 0.01
    assert evaluate(trained.vae, data, "bernoulli").evaluations[0].active_units > 0


def test_evaluation_leaves_the_model_as_it_was(trained: checkpoint.Checkpoint, digits: np.ndarray) -> None:
    vae = build(trained.config)
    assert vae.training
    before = torch.get_rng_state()
    bound(vae, digits, "bernoulli")
    assert vae.training
    assert torch.equal(torch.get_rng_state(), before)


def test_without_test_images_there_is_nothing_to_evaluate(trained: checkpoint.Checkpoint) -> None:
    data = load(trained.config.data)
    with pytest.raises(EvaluationError, match="no test images"):
        evaluate(trained.vae, replace(data, test=data.test[:0]), "bernoulli")


def test_a_diverged_model_has_no_figures(trained: checkpoint.Checkpoint) -> None:
    vae = build(trained.config)
    with torch.no_grad():
        vae.decoder.output_bias.fill_(math.nan)
    with pytest.raises(EvaluationError, match="diverged"):
        evaluate(vae, load(trained.config.data), "bernoulli")


def test_a_report_survives_its_file_and_keeps_the_protocol(trained: checkpoint.Checkpoint, tmp_path: Path) -> None:
    found = replace(evaluate(trained.vae, load(trained.config.data), "bernoulli", iw_samples=2), weights_sha256="abc")
    path = tmp_path / "report.json"
    path.write_text(found.to_json())
    assert Report.from_json(path) == found
    written = json.loads(path.read_text())
    assert written["evaluations"][0]["protocol"] == found.evaluations[0].protocol
    json_format.ParseDict(written["evaluations"][1], vae_pb2.Evaluation())


def test_a_report_lies_in_its_run_or_beside_a_checkpoint_taken_out_of_it() -> None:
    assert report.default_path(Path("runs/a/checkpoints/epoch-0003")) == Path("runs/a/evaluation.json")
    assert report.default_path(Path("kept/good")) == Path("kept/good.evaluation.json")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"evaluations": [{"images": "many"}]}', "[]"])
def test_another_file_is_no_report(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"other\.json"):
        Report.from_json(path)
    with pytest.raises(EvaluationError, match="cannot read"):
        Report.from_json(tmp_path / "missing.json")


def test_the_table_shows_the_figures_and_the_protocols_in_words(trained: checkpoint.Checkpoint) -> None:
    from rich.console import Console

    found = evaluate(trained.vae, load(trained.config.data), "bernoulli", iw_samples=2)
    console = Console(width=300)
    with console.capture() as capture:
        console.print(report.table(found))
    text = capture.get()
    for entry in found.evaluations:
        assert entry.protocol in text
        assert f"{entry.neg_elbo_nats:.6g}" in text
    assert f"{found.evaluations[0].iw_nll_nats:.6g}" in text
    assert "bits per dimension" not in text


class Replay(nn.Module):
    """A decoder that gives real images, whatever the latents."""

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__()
        self.images = torch.from_numpy(pixels) / 255

    def forward(self, latent: Tensor) -> Tensor:
        return self.images[: len(latent)]


def test_fid_tells_a_model_from_real_images_under_both_priors(trained: checkpoint.Checkpoint) -> None:
    data = load(DataConfig(dataset="arrays", path=MNIST_SUBSET))
    flow = FlowPrior(PriorConfig(couplings=2, hidden=4), trained.vae.latent_size)
    found = fid.fid_lenet(trained.vae, data, 200, prior=flow)
    real = copy.deepcopy(trained.vae)
    real.decoder = Replay(data.test)  # type: ignore[assignment]
    perfect = fid.fid_lenet(real, data, 200)
    assert (perfect.standard, perfect.fitted) == (pytest.approx(perfect.test), None)
    assert found.standard > 5 * found.test == 5 * perfect.test
    assert found.fitted == pytest.approx(found.standard, rel=0.3)  # a fresh flow is N(0, I)
    assert found.fitted != found.standard
    assert found.accuracy > 0.5


def test_fid_needs_enough_images_and_labels(trained: checkpoint.Checkpoint, digits: np.ndarray) -> None:
    data = load(DataConfig(dataset="arrays", path=MNIST_SUBSET))
    for samples in (84, 300):
        with pytest.raises(EvaluationError, match=rf"fid_samples is {samples}.*1024 training and 256 test.*85 to 256"):
            fid.fid_lenet(trained.vae, data, samples)
    with pytest.raises(EvaluationError, match=r"no labels.*leave fid_samples out"):
        fid.fid_lenet(trained.vae, replace(data, test_labels=None), 100)

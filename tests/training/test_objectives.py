from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from linear_gaussian import LinearDecoder, normal
from vaeserve_training import objectives
from vaeserve_training.config import preset
from vaeserve_training.models import Vae, build
from vaeserve_training.objectives import Observation, Posterior


def test_kl_closed_form_agrees_with_monte_carlo() -> None:
    mean, log_variance = normal(5, seed=1), normal(5, seed=2)
    stddev = torch.exp(0.5 * log_variance)
    latent = objectives.reparameterize(mean, log_variance, normal(400_000, 5))
    sampled = (Normal(mean, stddev).log_prob(latent) - Normal(0.0, 1.0).log_prob(latent)).mean(0)
    torch.testing.assert_close(objectives.kl_divergence(mean, log_variance), sampled, atol=0.02, rtol=0.01)


def test_kl_closed_form_agrees_with_torch_and_vanishes_at_the_prior() -> None:
    mean, log_variance = normal(7, seed=3), normal(7, seed=4)
    expected = kl_divergence(Normal(mean, torch.exp(0.5 * log_variance)), Normal(torch.zeros(7), torch.ones(7)))
    torch.testing.assert_close(objectives.kl_divergence(mean, log_variance), expected)
    assert objectives.kl_divergence(torch.zeros(3), torch.zeros(3)).eq(0).all()


def test_reparameterized_latents_have_the_posteriors_moments() -> None:
    mean, log_variance = torch.tensor([1.0, -2.0]), torch.tensor([0.0, -3.0])
    latent = objectives.reparameterize(mean, log_variance, normal(200_000, 2))
    torch.testing.assert_close(latent.mean(0).float(), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(latent.std(0).float(), torch.exp(0.5 * log_variance), atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 2)])
def test_bernoulli_probabilities_of_all_images_sum_to_one(shape: tuple[int, int, int]) -> None:
    pixels = math.prod(shape)
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=pixels))).reshape(-1, *shape).double()
    logits = 3 * normal(1, *shape).expand_as(images)
    total = torch.exp(-objectives.bernoulli_nll(logits, images)).sum()
    assert float(total) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_gaussian_density_integrates_to_one(sigma: float) -> None:
    axis = torch.linspace(-3, 4, 1401, dtype=torch.float64)
    first, second = torch.meshgrid(axis, axis, indexing="ij")
    targets = torch.stack([first.flatten(), second.flatten()], 1).reshape(-1, 1, 1, 2)
    image = torch.tensor([0.2, 0.7], dtype=torch.float64).reshape(1, 1, 1, 2).expand_as(targets)
    density = torch.exp(-objectives.gaussian_nll(image, targets, torch.tensor(sigma).double().log()))
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1.0, abs=1e-6)


def test_gaussian_nll_agrees_with_torch() -> None:
    image, target = normal(4, 3, 2, 2, seed=1), normal(4, 3, 2, 2, seed=2)
    expected = -Normal(image, 0.4).log_prob(target).flatten(1).sum(1)
    torch.testing.assert_close(objectives.gaussian_nll(image, target, torch.tensor(0.4).double().log()), expected)


def test_mse_is_a_gaussian_of_half_the_pixels_as_variance_up_to_a_constant() -> None:
    image, target = torch.rand(6, 1, 28, 28).double(), torch.rand(6, 1, 28, 28).double()
    pixels = 28 * 28
    log_sigma = torch.tensor(392.0, dtype=torch.float64).log() / 2  # variance 392 = pixels / 2
    difference = objectives.gaussian_nll(image, target, log_sigma) - objectives.mean_squared_error(image, target)
    constant = 0.5 * pixels * math.log(2 * math.pi * 392)
    torch.testing.assert_close(difference, torch.full((6,), constant, dtype=torch.float64))


def test_the_optimal_sigma_is_the_likeliest_one() -> None:
    image, target = torch.rand(8, 1, 6, 6).double(), torch.rand(8, 1, 6, 6).double()
    best = objectives.optimal_log_sigma(image, target)
    at_best = objectives.gaussian_nll(image, target, best).mean()
    for step in (-0.05, 0.05):
        assert objectives.gaussian_nll(image, target, best + step).mean() > at_best


def test_bernoulli_observation_is_one_sample_for_encoder_and_target() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3).expand(20_000, 1, 1, 3)
    uniform = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    observation = objectives.observe(pixels, uniform, "bernoulli")
    assert torch.equal(observation.encoder_input, observation.target)
    assert observation.target.unique().tolist() == [0, 1]
    share = observation.target.mean(0).flatten()
    assert share[0] == 0
    assert share[2] == 1
    assert float(share[1]) == pytest.approx(0.2, abs=0.01)


def test_gaussian_observation_dequantises_the_target_and_not_the_input() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    uniform = torch.rand(pixels.shape)
    observation = objectives.observe(pixels, uniform, "gaussian")
    torch.testing.assert_close(observation.encoder_input, pixels / 255)
    assert torch.equal((observation.target * 256).floor().to(torch.uint8), pixels)
    assert not torch.equal(observation.target, observation.encoder_input)


def test_noise_is_asked_for_where_it_is_needed() -> None:
    with pytest.raises(ValueError, match="uniform noise"):
        objectives.observe(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), None, "bernoulli")


def test_terms_are_distortion_plus_rate_of_each_image() -> None:
    vae = build(preset("mnist-mlp")).eval()
    target = (torch.rand(5, 1, 28, 28) < 0.3).float()
    noise = normal(5, 20).float()
    terms = objectives.terms(vae, Observation(target, target), noise, "bernoulli")
    mean, log_variance = vae.encoder(target)
    probability = vae.decoder(mean + torch.exp(0.5 * log_variance) * noise)
    log_likelihood = (target * probability.log() + (1 - target) * (1 - probability).log()).flatten(1).sum(1)
    torch.testing.assert_close(terms.distortion, -log_likelihood)
    torch.testing.assert_close(terms.rate, objectives.kl_divergence(mean, log_variance).sum(1))
    torch.testing.assert_close(terms.neg_elbo, terms.distortion + terms.rate)


def test_one_importance_sample_is_the_sampled_bound_with_the_same_noise() -> None:
    vae = build(preset("mnist-mlp")).eval()
    target = (torch.rand(5, 1, 28, 28) < 0.3).float()
    noise = normal(1, 5, 20).float()
    posterior = objectives.encode(vae, target)
    weights = objectives.log_importance_weights(vae, posterior, target, noise, "bernoulli")
    q = Normal(posterior.mean, torch.exp(0.5 * posterior.log_variance))
    latent = posterior.mean + q.stddev * noise[0]
    rate_sample = (q.log_prob(latent) - Normal(0.0, 1.0).log_prob(latent)).sum(1)
    expected = objectives.bernoulli_nll(vae.decoder.logits(latent), target) + rate_sample
    torch.testing.assert_close(objectives.iw_nll(weights), expected, rtol=1e-5, atol=1e-3)


def linear_gaussian() -> tuple[Vae, Tensor, Posterior, Tensor]:
    """A model with orthogonal weights, images, their exact posterior (it is diagonal) and their exact NLL."""
    sigma, shape = 0.3, (1, 2, 3)
    basis, _ = torch.linalg.qr(normal(6, 2, seed=5))
    weight, offset = basis * torch.tensor([0.9, 0.4]), normal(6, seed=6)
    vae = Vae(nn.Identity(), LinearDecoder(weight, offset, shape), torch.tensor(math.log(sigma)).double()).eval()
    images = (normal(4, 2, seed=7) @ weight.T + offset + sigma * normal(4, 6, seed=8)).detach()
    precision = 1 + weight.square().sum(0) / sigma**2
    mean = (images - offset) @ weight / sigma**2 / precision
    posterior = Posterior(mean, -precision.log().expand_as(mean))
    marginal = MultivariateNormal(offset, weight @ weight.T + sigma**2 * torch.eye(6, dtype=torch.float64))
    return vae, images.unflatten(1, shape), posterior, -marginal.log_prob(images)


def test_with_the_exact_posterior_every_importance_weight_is_the_likelihood() -> None:
    vae, images, posterior, nll = linear_gaussian()
    weights = objectives.log_importance_weights(vae, posterior, images, normal(7, 4, 2, seed=9), "gaussian")
    torch.testing.assert_close(-weights, nll.expand(7, 4), rtol=1e-5, atol=1e-5)


def test_with_a_wrong_posterior_the_bound_tightens_towards_the_likelihood() -> None:
    vae, images, posterior, nll = linear_gaussian()
    wrong = Posterior(posterior.mean + 0.1, posterior.log_variance + 0.8)
    noise = normal(40_000, 4, 2, seed=10)
    weights = objectives.log_importance_weights(vae, wrong, images, noise, "gaussian").detach()
    gaps = []
    for k in (1, 10, 100):
        bounds = objectives.iw_nll(weights.reshape(k, 40_000 // k, 4))
        gaps.append((bounds.mean(0) - nll).mean())
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0
    torch.testing.assert_close(objectives.iw_nll(weights), nll, atol=0.01, rtol=0)


class AmortisedPosterior(nn.Module):
    """An encoder whose posterior is linear in the image, so that it may be wrong and has gradients."""

    def __init__(self, posterior: Posterior, images: Tensor) -> None:
        super().__init__()
        flat = images.flatten(1)
        self.matrix = nn.Parameter(torch.linalg.lstsq(flat, posterior.mean + 0.1).solution)
        self.log_variance = nn.Parameter(posterior.log_variance[0] + 0.8)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean = image.flatten(1) @ self.matrix
        return mean, self.log_variance.expand_as(mean)


def wrong_linear_gaussian() -> tuple[Vae, Observation, Tensor]:
    """The linear model with a posterior that is wrong, its images, and their exact NLL."""
    vae, images, posterior, nll = linear_gaussian()
    vae.encoder = AmortisedPosterior(posterior, images)  # type: ignore[assignment]
    vae.decoder.double()
    return vae, Observation(images, images), nll.detach()


def repeated(observation: Observation, times: int) -> Observation:
    return Observation(observation.encoder_input.repeat(times, 1, 1, 1), observation.target.repeat(times, 1, 1, 1))


def gradients(vae: Vae, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*vae.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_the_elbo_of_k_samples_is_the_mean_over_the_samples() -> None:
    vae, observation, _ = wrong_linear_gaussian()
    noise = normal(3, 4, 2, seed=12)
    loss, found = objectives.losses(vae, observation, noise, "gaussian", rate_weight=0.7)
    each = [objectives.terms(vae, observation, one, "gaussian") for one in noise]
    distortion = torch.stack([terms.distortion for terms in each]).mean(0)
    torch.testing.assert_close(found.distortion, distortion)
    torch.testing.assert_close(found.rate, each[0].rate)
    torch.testing.assert_close(loss, distortion + 0.7 * each[0].rate)


def test_at_k_1_both_bounds_have_the_same_mean_and_the_same_mean_gradient() -> None:
    vae, observation, _ = wrong_linear_gaussian()
    draws = 20_000
    noise = normal(1, 4 * draws, 2, seed=13)
    many = repeated(observation, draws)
    sampled, _ = objectives.losses(vae, many, noise, "gaussian", bound="iwae")
    closed, _ = objectives.losses(vae, many, noise, "gaussian", bound="elbo")
    assert sampled.mean().item() == pytest.approx(closed.mean().item(), abs=0.02)
    expected = gradients(vae, closed.mean())
    for name, gradient in gradients(vae, sampled.mean()).items():
        torch.testing.assert_close(gradient, expected[name], atol=0.05, rtol=0.02, msg=name)


def test_the_iwae_bound_tightens_with_k_and_never_passes_the_likelihood() -> None:
    vae, observation, nll = wrong_linear_gaussian()
    found = []
    for k in (1, 5, 50):
        draws = 10_000 // k
        losses, _ = objectives.losses(
            vae, repeated(observation, draws), normal(k, 4 * draws, 2, seed=k), "gaussian", bound="iwae"
        )
        found.append((losses - nll.repeat(draws)).mean().item())
    assert found[0] > 2 * found[1] > 4 * found[2] > 0


def test_the_iwae_gradient_is_the_weighted_mean_of_the_samples_gradients() -> None:
    # Burda, Grosse and Salakhutdinov 2016, equations 13 and 14: the weights are w_i / sum of w.
    vae, observation, _ = wrong_linear_gaussian()
    noise, image = normal(5, 1, 2, seed=14), Observation(observation.encoder_input[:1], observation.target[:1])
    loss, _ = objectives.losses(vae, image, noise, "gaussian", bound="iwae")
    posterior = objectives.encode(vae, image.encoder_input)
    log_weights = objectives.log_importance_weights(vae, posterior, image.target, noise, "gaussian")
    each = [
        gradients(vae, objectives.losses(vae, image, one[None], "gaussian", bound="iwae")[0].sum()) for one in noise
    ]
    shares = log_weights.detach().softmax(0).flatten()
    assert shares.max() < 0.9
    for name, gradient in gradients(vae, loss.sum()).items():
        mean = sum(share * one[name] for share, one in zip(shares, each, strict=True))
        torch.testing.assert_close(gradient, mean, msg=name)


def test_at_k_1_the_expected_importance_bound_is_the_closed_form_bound() -> None:
    vae, images, posterior, _ = linear_gaussian()
    wrong = Posterior(posterior.mean + 0.1, posterior.log_variance + 0.8)
    noise = normal(40_000, 4, 2, seed=11)
    weights = objectives.log_importance_weights(vae, wrong, images, noise, "gaussian")
    rate = objectives.kl_divergence(*wrong).sum(1)
    latent = objectives.reparameterize(*wrong, noise).flatten(0, 1)
    repeated = images.expand(40_000, *images.shape).flatten(0, 1)
    distortion = objectives.distortion(vae, latent, repeated, "gaussian").reshape(40_000, 4).mean(0)
    torch.testing.assert_close(-weights.mean(0), distortion + rate, atol=0.02, rtol=0)

"""The ladder's estimators against cases whose answer is known."""

import math

import numpy as np
import pytest
import torch

from vaeserve_training.compute import cpu_threads
from vaeserve_training.ladder import distances, information


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The pieces are too small to be shared between threads, which would wait for each other on a busy machine."""
    with cpu_threads(1):
        yield


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mutual_information_of_gaussian_inputs_meets_the_capacity():
    inputs = 3 * gaussian(6000, 1)
    found = information.mutual_information(inputs, torch.full_like(inputs, 0.5), draws=6000, seed=1)
    assert information.bits(found.nats) == pytest.approx(information.capacity_bits(9 / 0.25), abs=0.04)
    assert found.saturation < 0.3


def test_mutual_information_is_additive_over_independent_latents():
    inputs = gaussian(6000, 2)
    stddev = torch.tensor([0.5, 1.0]).expand_as(inputs)
    found = information.mutual_information(inputs, stddev, draws=6000, seed=1)
    expected = 0.5 * math.log(1 + 4) + 0.5 * math.log(1 + 1)
    assert found.nats == pytest.approx(expected, abs=0.04)


def test_mutual_information_never_exceeds_log_n_and_says_when_it_saturates():
    inputs = gaussian(50, 20)
    found = information.mutual_information(inputs, torch.full_like(inputs, 1e-3), draws=500, seed=0)
    assert found.nats == pytest.approx(math.log(50), abs=1e-9)
    assert found.saturation == pytest.approx(1.0)


def test_mutual_information_of_two_names_is_that_of_the_binary_input_channel():
    names = torch.tensor([[-1.0], [1.0]])
    found = information.mutual_information(names, torch.ones(2, 1), draws=200_000, seed=0)
    # The capacity of the binary-input Gaussian channel at S/N = 1 (0 dB), a textbook value.
    assert information.bits(found.nats) == pytest.approx(0.4859, abs=0.005)


def test_mutual_information_is_zero_where_all_posteriors_are_equal():
    found = information.mutual_information(torch.zeros(100, 3), torch.ones(100, 3), draws=1000, seed=0)
    assert found.nats == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("centre", "width"), [(0.0, 1.0), (1.5, 0.7), (-0.3, 2.0), (0.0, 0.02)])
def test_marginal_kl_of_equal_posteriors_is_the_closed_form(centre, width):
    centres, widths = torch.full((600, 1), centre).double(), torch.full((600, 1), width).double()
    kl = information.marginal_kl(centres, widths)
    assert float(kl) == pytest.approx(0.5 * (centre**2 + width**2 - 1) - math.log(width), abs=1e-6)


def test_marginal_kl_of_a_mixture_that_is_the_prior_vanishes():
    # N(0, 0.8^2) means under noise of 0.6: the aggregate posterior is N(0, 1), though each posterior is far from it.
    mean = 0.8 * gaussian(20_000, 2)
    assert information.marginal_kl(mean, torch.full_like(mean, 0.6)).tolist() == pytest.approx([0, 0], abs=2e-3)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_separability_of_shifted_gaussians(shift):
    first, second = gaussian(6000, 4, seed=3), gaussian(6000, 4, seed=4)
    second[:, 0] += shift
    # The best classifier's AUC for two Gaussians of unit variance is Phi(shift / sqrt 2).
    best = 0.5 * (1 + math.erf(shift / 2))
    assert information.separability(first, second, seed=0) == pytest.approx(best, abs=0.03)


def test_separability_sees_a_difference_in_shape_alone():
    assert information.separability(gaussian(4000, 2, seed=5), 3 * gaussian(4000, 2, seed=6), seed=0) > 0.8


def test_confusion_rate_of_two_names():
    assert information.confusion_rate(0.01, 1.0) == pytest.approx(0.498, abs=1e-4)
    assert information.confusion_rate(2.0, 1.0) == pytest.approx(0.158655, abs=1e-6)
    assert information.confusion_rate(0.01, 1e-4) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    random = torch.Generator().manual_seed(0)
    real = torch.randn(100_000, 3, generator=random, dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    generated = torch.randn(100_000, 3, generator=random, dtype=torch.float64) * scale + 1
    # |mean difference|^2 + sum (s1 - s2)^2 for diagonal covariances.
    assert distances.frechet_distance(real, generated) == pytest.approx(3 + 0 + 1 + 0.25, rel=0.02)


def test_frechet_distance_is_exact_for_equal_and_for_shifted_sets():
    features = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)).double()
    assert distances.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert distances.frechet_distance(features, features + 2) == pytest.approx(24, abs=1e-6)


def test_precision_and_recall_tell_lost_modes_from_stray_samples():
    random = torch.Generator().manual_seed(0)
    left, right = torch.randn(600, 2, generator=random), torch.randn(600, 2, generator=random) + 50
    both = torch.cat([left, right])
    only_left = torch.randn(600, 2, generator=random)
    lost = distances.precision_recall(both, only_left)
    assert lost.precision > 0.9
    assert 0.4 < lost.recall < 0.55
    stray = distances.precision_recall(left, torch.cat([only_left, right]))
    assert 0.4 < stray.precision < 0.55
    assert stray.recall > 0.9


def test_core_precision_does_not_fall_for_an_outliers_reach():
    random = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(600, 2, generator=random), 100 * torch.randn(20, 2, generator=random)])
    strange = torch.tensor([60.0, 60.0]) + torch.randn(500, 2, generator=random)
    found = distances.precision_recall(real, strange)
    assert found.precision > 0.9
    assert found.core_precision == 0
    assert distances.precision_recall(real, torch.randn(600, 2, generator=random)).core_precision > 0.8


def test_nearest_finds_the_image_itself():
    images = torch.rand(700, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = distances.nearest(images[:600] + 0.001, images)
    assert (found.row == np.arange(600)).all()
    assert found.mse == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("unseen", [900, 150])
def test_copies_are_told_from_fresh_images_however_many_more_were_trained_on(unseen):
    random = torch.Generator().manual_seed(0)
    train, fresh = torch.rand(2, 900, 1, 3, 3, generator=random)
    held_out = torch.rand(unseen, 1, 3, 3, generator=random)
    none = distances.copied_share(fresh, train, held_out)
    assert none.standard_error == pytest.approx(math.sqrt(900 / unseen / 900))
    assert none.share == pytest.approx(0, abs=3 * none.standard_error)
    assert distances.copied_share(train + 1e-4, train, held_out).share == 1
    half = torch.cat([train[450:], fresh[:450]])
    assert distances.copied_share(half, train, held_out).share == pytest.approx(0.5, abs=3 * none.standard_error)


def test_channel_information_is_the_textbook_value():
    # The capacity of the binary-input Gaussian channel at S/N = 1 (0 dB).
    assert information.bits(information.channel_information(torch.tensor([-1.0, 1.0]), 1.0)) == pytest.approx(
        0.48594, abs=1e-5
    )
    assert information.channel_information(torch.tensor([-1.0, 1.0]), 0.01) == pytest.approx(math.log(2), abs=1e-9)
    assert information.channel_information(torch.zeros(3), 1.0) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("stddev", [0.2, 1.0, 100.0])
def test_channel_information_of_gaussian_inputs_is_the_capacity(stddev):
    inputs = information.gaussian_inputs(300, 1.0)
    assert float(inputs.var(correction=0)) == pytest.approx(1)
    found = information.bits(information.channel_information(inputs, stddev))
    assert found == pytest.approx(information.capacity_bits(stddev**-2), rel=1e-3)


def test_the_standard_error_of_mutual_information_is_right():
    inputs = 2 * gaussian(50, 1)
    found = [
        information.mutual_information(inputs, torch.full_like(inputs, 0.5), draws=400, seed=seed) for seed in range(60)
    ]
    spread = float(torch.tensor([one.nats for one in found]).std())
    # Draws are spread evenly over the posteriors, so the estimates scatter somewhat less than independent draws would.
    assert 0.5 < spread / found[0].standard_error_nats < 1.2


def test_sampled_kl_is_the_closed_form():
    mean, log_variance = gaussian(40, 5), gaussian(40, 5, seed=1).clamp(-3, 1)
    estimate, error = information.kl_by_sampling(mean, log_variance, draws=400, seed=0)
    closed = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
    deviations = (estimate - closed) / error
    assert float(deviations.abs().max()) < 4.5
    assert 0.7 < float(deviations.std()) < 1.4  # the standard errors are right, too


def test_sampled_kl_of_the_prior_is_zero():
    estimate, error = information.kl_by_sampling(torch.zeros(3, 4), torch.zeros(3, 4), draws=10, seed=0)
    assert estimate.abs().max() < 1e-12
    assert error.abs().max() < 1e-12

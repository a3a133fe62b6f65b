"""Every step of the ladder on a handful of images: its claims, and not only that it runs."""

import functools
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headless import find_browser, open_page
from vaeserve_training import figures_ladder
from vaeserve_training.__main__ import main
from vaeserve_training.compute import cpu_threads
from vaeserve_training.config import DataConfig, ModelConfig, PriorConfig, preset
from vaeserve_training.data import load
from vaeserve_training.ladder import cache, climb, codes, decode, page, specs, training
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.lenet import LadderDataError
from vaeserve_training.ladder.registry import STEPS
from vaeserve_training.ladder.results import Claim, in_words
from vaeserve_training.ladder.scale import FULL, QUICK
from vaeserve_training.ladder.showcase import manifold
from vaeserve_training.ladder.systems import image_mse, intensity
from vaeserve_training.ladder.workshop import WorkerError, Workshop

MNIST_SUBSET = Path(__file__).parents[1] / "data" / "mnist_subset.npz"

HANDFUL = QUICK.model_copy(
    update={
        "name": "a handful of images",
        "base": preset("mnist-mlp").with_changes(
            model={"hidden": (128,), "latent_size": 8},
            optimiser={"warmup_steps": 20, "batch_size": 64, "learning_rate": 2e-3, "ema_decay": 0.98},
        ),
        "train_images": 1024,
        "growing_images": (128, 1024),
        "steps": 200,
        "snapshots": (0, 10, 100),
        "betas": (0.1, 1.0, 8.0),
        "plane": ModelConfig(latent_size=2, channels=(), hidden=(128, 64)),
        "deconvolution": ModelConfig(latent_size=4, channels=(8, 16), hidden=(128,)),
        "constant_steps": 700,
        "one_hot_images": (1, 3, 6),
        "one_hot_steps": 1500,
        "vector_sizes": (1, 8),
        "vector_steps": 320,
        "samples": 256,
        "prior": PriorConfig(couplings=2, hidden=32, steps=150, batch_size=128),
        "draws": 200,
        "neg_elbo_bound_nats": 155.0,
    }
)
# What does not hold, here as with all images: a VAE codes by leaving N(0, I), and its reconstructions are blurred.
DO_NOT_HOLD = {
    6: {"The VAE's images from N(0, I) are nearer to the data than an autoencoder's from a fitted Gaussian."},
    9: {"Training raises the standard deviation towards one."},
    10: {
        "Midway between codes of unseen images lie better images in the VAE, with 128 training images.",
        "Midway between codes of unseen images lie better images in the VAE, with 1 024 training images.",
        "Codes of unseen images hold them better in the VAE, with 1 024 training images.",
        "They do so in nats, too, with 1 024 training images.",
        "Reconstructions of unseen images are nearer to the data from the VAE, with 128 training images.",
        "Reconstructions of unseen images are nearer to the data from the VAE, with 1 024 training images.",
    },
}
# What a step is to show and measure: columns, rows, titles and measures that its results must have, and pictures.
SHOWN = {
    1: {"mean squared error after training", "01-over-training.png"},
    2: {
        "mean squared error of the worst image",
        "optimiser steps",
        "mean squared error to the nearest memorised image",
        "02-steps.png",
        "02-unseen.png",
    },
    3: {
        "fixed: images",
        "learned: images",
        "fixed: midpoints to the nearest image",
        "learned: midpoints to the nearest image",
        "03-dimension.png",
        "03-midpoints.png",
    },
    4: {
        "mean squared error, unseen images",
        "largest difference of a pixel, on the scale 0..1",
        "FID-LeNet of images from N(0, I)",
        "04-reconstructions.png",
        "04-samples.png",
    },
    5: {
        "-ELBO",
        "distortion",
        "rate",
        "active units of 8",
        "difference to the Monte Carlo estimate, in its standard errors",
        "mean squared error + KL",
        "squared error, sigma learned",
        "05-kl.png",
    },
    6: {
        "autoencoder, N(0, I)",
        "VAE, N(0, I)",
        "VAE, flow fitted to its codes",
        "unseen images themselves (floor)",
        "FID-LeNet",
        "precision",
        "recall",
        "core precision",
        "estimated share of copies",
        "06-samples.png",
        "06-nearest.png",
    },
    7: {
        "distortion",
        "rate",
        "marginal KL, sum",
        "Marginal KL of each latent in nats, falling",
        "AUC",
        "share of log N",
        "07-rate-distortion.png",
    },
    8: {
        "taken for the other",
        "capacity, bits",
        "Gaussian inputs, bits",
        "the names, bits",
        "The VAE's latents as such channels, in bits",
        "08-channel.png",
        "08-latents.png",
    },
    9: {
        "Posterior standard deviation of each latent, by falling KL",
        "KL of each latent in nats, falling",
        "active units of 8",
        "09-over-beta.png",
        "09-over-training.png",
    },
    10: {
        "gap, nats",
        "distortion at the mean, unseen, nats",
        "samples, N(0, I)",
        "midpoints of codes of unseen images",
        "mean squared error, unseen",
        "10-errors.png",
        "10-quality.png",
    },
    11: {
        "-ELBO of unseen images, nats",
        "FID-LeNet of samples",
        "11-reconstructions.png",
        "11-samples.png",
        "11-manifold.png",
        "11-interpolation.png",
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The networks are too small to be shared between threads, which would wait for each other."""
    with cpu_threads(1):
        yield


@pytest.fixture(scope="module")
def data():
    return load(DataConfig(dataset="arrays", path=MNIST_SUBSET))


@pytest.fixture(scope="module")
def few(data):
    """So few images that processes start with them at once."""
    return replace(
        data,
        train=data.train[:40],
        train_labels=data.train_labels[:40],
        test=data.test[:20],
        test_labels=data.test_labels[:20],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the one ladder that is climbed here, by `step`."""
    return tmp_path_factory.mktemp("ladder")


@pytest.fixture(scope="module")
def step(folder, data, one_thread):
    """Climb a step, if it was not yet, and return its results: one at a time, or a test would wait for all of them."""

    def climbed(number):
        climb.climb(HANDFUL, data, folder, numbers=(number,), device="cpu", workers=1)
        found = json.loads((folder / climb.RESULTS).read_bytes())["steps"]
        return next(result for result in found if result["number"] == number)

    return functools.cache(climbed)


@pytest.fixture
def results(step):
    """The results of the whole ladder."""
    return {number: step(number) for number in STEPS}


@pytest.fixture
def lab(folder, data):
    return Lab(HANDFUL.within(data), data, folder, device="cpu")


@pytest.mark.parametrize("number", STEPS)
def test_claims_of_a_step(step, number):
    claims = step(number)["claims"]
    broken = {claim["claim"] for claim in claims if not claim["held"]}
    assert claims
    assert broken == DO_NOT_HOLD.get(number, set()), [claim for claim in claims if not claim["held"]]


@pytest.mark.parametrize("number", STEPS)
def test_a_step_shows_and_measures_all_that_it_is_to(step, folder, number):
    result = step(number)
    words = {claim["measure"] for claim in result["claims"]} | {picture["file"] for picture in result["pictures"]}
    for table in result["tables"]:
        words |= {table["title"], *table["columns"], *(str(row[0]) for row in table["rows"])}
    assert words >= SHOWN[number]
    report = (folder / climb.REPORT).read_text()
    assert [word for word in SHOWN[number] if not word.endswith(".png") and page.escape(word) not in report] == []


def test_the_figures_of_each_latent_add_up(step):
    def table(number, title):
        (found,) = (table for table in step(number)["tables"] if table["title"].startswith(title))
        return [[cell if isinstance(cell, str) else cell[0] for cell in row[1:]] for row in found["rows"]]

    aggregate = table(7, "Rate, distortion")
    for (_, _, total, largest, _), latents in zip(aggregate, table(7, "Marginal KL of each"), strict=True):
        assert len(latents) == 8
        assert latents == sorted(latents, reverse=True)
        assert (sum(latents), latents[0]) == pytest.approx((total, largest))
    together = table(9, "Over the weight") + table(9, "Over training")
    stddev, kl = table(9, "Posterior standard deviation"), table(9, "KL of each")
    assert len(together) == len(HANDFUL.betas) + len(HANDFUL.snapshots) + 1
    for (mean, smallest, largest, total, _), widths, nats in zip(together, stddev, kl, strict=True):
        assert nats == sorted(nats, reverse=True)
        assert (sum(widths) / 8, min(widths), max(widths)) == pytest.approx((mean, smallest, largest))
        assert sum(nats) == pytest.approx(total)


@pytest.mark.parametrize("number", STEPS)
def test_every_picture_of_a_step_is_there_and_says_the_sizes(step, folder, number):
    result = step(number)
    assert result["pictures"]
    for picture in result["pictures"]:
        assert (folder / picture["file"]).read_bytes().startswith(b"\x89PNG")
    assert "seed 0" in result["sizes"]
    assert "training image" in result["sizes"]


def test_only_the_source_of_the_code_differs_between_autoencoder_and_vae():
    plain, vae = specs.autoencoder(HANDFUL, 0, images=128), specs.variational_autoencoder(HANDFUL, 0, images=128)
    assert plain.config == vae.config
    assert (plain.codes, vae.codes) == ("encoder", "encoder with noise")


def test_sources_give_the_codes_they_are_named_for(data):
    encoder = training.build(specs.autoencoder(HANDFUL, 0), data).source.encoder
    image, row, noise = torch.rand(3, 1, 28, 28), torch.tensor([0, 2, 1]), torch.randn(3, 8)

    def code(name):
        torch.manual_seed(0)
        return codes.make_source(name, images=3, size=8, encoder=encoder)(image, row, noise)

    mean, log_variance = encoder(image)
    assert (code("constant").latent == 1).all()
    assert (code("one-hot").latent == torch.eye(8)[row]).all()
    assert (code("fixed vectors").latent == code("learned vectors").latent).all()
    assert len(code("fixed vectors").latent.unique(dim=0)) == 3
    assert (code("encoder").latent == mean).all()
    noisy = code("encoder with noise")
    assert torch.allclose(noisy.latent, mean + (log_variance / 2).exp() * noise)
    assert (noisy.rate > 0).all()
    free = ("constant", "one-hot", "fixed vectors", "learned vectors", "encoder")
    assert all((code(name).rate == 0).all() for name in free)


def test_only_learned_vectors_are_learned(data):
    short = HANDFUL.model_copy(update={"vector_steps": 20})
    spec = {name: specs.vectors(short, name, 2, 0) for name in ("fixed vectors", "learned vectors")}
    start = {name: training.build(spec[name], data).source.vectors.clone() for name in spec}
    end = {name: training.train(spec[name], data, device="cpu").system.source.vectors for name in spec}
    assert (start["fixed vectors"] == start["learned vectors"]).all()
    assert (end["fixed vectors"] == start["fixed vectors"]).all()
    assert (end["learned vectors"] != start["learned vectors"]).all()


def test_a_memoriser_knows_nothing_of_its_images_before_training(data):
    spec = specs.constant(HANDFUL, 0)
    pixels = torch.from_numpy(data.train[:1])
    assert float(image_mse(training.build(spec, data).reconstruct(pixels), pixels)) > 0.1


def test_equal_specs_train_to_equal_weights_and_seeds_differ(data):
    short = specs.variational_autoencoder(HANDFUL.model_copy(update={"steps": 32}), 0)
    other = short.model_copy(update={"config": short.config.with_changes(run={"seed": 1})})
    first, second, third = (
        training.train(spec, data, device="cpu").system.state_dict() for spec in (short, short, other)
    )
    assert all((first[name] == second[name]).all() for name in first)
    assert not all((first[name] == third[name]).all() for name in first)


def test_a_cached_system_is_the_trained_one(data, tmp_path):
    spec = specs.variational_autoencoder(HANDFUL.model_copy(update={"steps": 32, "snapshots": (0, 10)}), 0)
    advanced: list[int] = []
    store = cache.Cache(tmp_path)
    trained = cache.trained_system(store, spec, data, device="cpu", advance=advanced.append)
    again = cache.trained_system(store, spec, data, device="cpu", advance=advanced.append)
    assert sum(advanced) == training.total_steps(spec) == 32
    pixels = torch.from_numpy(data.test[:5])
    for step in (0, 10):
        assert (trained.at(step).reconstruct(pixels) == again.at(step).reconstruct(pixels)).all()
    assert (trained.system.reconstruct(pixels) == again.system.reconstruct(pixels)).all()
    assert not torch.equal(again.at(0).reconstruct(pixels), again.system.reconstruct(pixels))
    assert trained.history == again.history


def test_a_damaged_cache_entry_is_named(data, tmp_path):
    spec = specs.constant(HANDFUL.model_copy(update={"constant_steps": 2}), 0)
    store = cache.Cache(tmp_path)
    cache.trained_system(store, spec, data, device="cpu")
    path = store.path(cache.system_key(spec, data))
    (path / cache.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(cache.CacheError, match=path.name):
        cache.trained_system(store, spec, data, device="cpu")


@pytest.mark.usefixtures("results")
def test_a_finished_ladder_trains_and_measures_nothing(folder, data, monkeypatch):
    before = (folder / climb.RESULTS).read_bytes()
    monkeypatch.setattr(cache, "train", None)
    monkeypatch.setattr(climb, "_run", None)
    climb.climb(HANDFUL, data, folder, device="cpu", workers=1)
    assert (folder / climb.RESULTS).read_bytes() == before


def test_a_killed_ladder_goes_on_with_what_is_finished(data, tmp_path, monkeypatch):
    small = HANDFUL.model_copy(update={"constant_steps": 5, "one_hot_steps": 5})
    really_train, trained = cache.train, []

    def train_until_killed(spec, *arguments, **options):
        if spec.codes == "one-hot" and spec.images == 3 and len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((spec.codes, spec.images))
        return really_train(spec, *arguments, **options)

    monkeypatch.setattr(cache, "train", train_until_killed)
    with pytest.raises(KeyboardInterrupt):
        climb.climb(small, data, tmp_path, numbers=(1, 2), device="cpu")
    assert trained == [("constant", 1), ("one-hot", 1)]
    assert [step["number"] for step in json.loads((tmp_path / climb.RESULTS).read_bytes())["steps"]] == [1]
    trained.append(("killed", 0))
    climb.climb(small, data, tmp_path, numbers=(1, 2), device="cpu")
    assert trained[3:] == [("one-hot", 3), ("one-hot", 6)]
    assert [step["number"] for step in json.loads((tmp_path / climb.RESULTS).read_bytes())["steps"]] == [1, 2]


def test_networks_trained_side_by_side_are_the_same(few, tmp_path):
    small = HANDFUL.model_copy(update={"constant_steps": 40, "one_hot_steps": 40})
    steps = {}
    for workers in (1, 2):
        climb.climb(small, few, tmp_path / str(workers), numbers=(1, 2), device="cpu", workers=workers)
        found = json.loads((tmp_path / str(workers) / climb.RESULTS).read_bytes())["steps"]
        steps[workers] = [(step["claims"], step["tables"]) for step in found]
    assert steps[1] == steps[2]


def test_a_failure_in_another_process_is_told(few, tmp_path):
    (tmp_path / "cache").touch()  # a file where the folder belongs
    with pytest.raises(OSError, match="cache"):
        climb.climb(HANDFUL.model_copy(update={"one_hot_steps": 2}), few, tmp_path, numbers=(2,), workers=2)
    assert not any(process.is_alive() for process in multiprocessing.active_children())


def test_a_process_that_was_killed_is_told(few, tmp_path):
    with Workshop(Lab(HANDFUL, few, tmp_path, device="cpu"), [STEPS[2]], 2, lambda _: None) as workshop:
        multiprocessing.active_children()[0].kill()
        with pytest.raises(WorkerError, match=r"was killed.*finished networks are kept: run it again"):
            workshop.wait_for(STEPS[2])


def test_of_a_small_data_set_all_images_are_used(few):
    scale = QUICK.within(few)
    assert (scale.train_images, scale.growing_images, scale.one_hot_images) == (40, (40,), (1, 4, 16, 40))
    assert scale.samples == 20


def test_results_of_other_sizes_are_not_taken_for_these(data, tmp_path):
    small = HANDFUL.model_copy(update={"constant_steps": 5})
    climb.climb(small, data, tmp_path, numbers=(1,), device="cpu")
    other = Lab(small.model_copy(update={"constant_steps": 6}).within(data), data, tmp_path)
    assert [step.number for step in climb.unfinished(other, [1])] == [1]


def test_saved_codes_are_decoded_by_the_program_that_step_4_starts(lab, folder):
    spec = specs.variational_autoencoder(lab.scale, 0)
    codes_file, images_file = folder / "codes.npz", folder / "images.npz"
    latent = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    np.savez(codes_file, codes=latent.numpy())
    trained = lab.trained(spec).system
    entry = lab.cache.path(cache.system_key(spec, lab.data))
    assert decode.main([str(entry), str(codes_file), str(images_file)]) == 0
    with np.load(images_file) as arrays:
        later = arrays["images"]
    assert np.abs(later - trained.decode(latent).numpy()).max() < 1e-6


def test_the_classifier_knows_the_digits(lab):
    assert lab.classifier.accuracy(intensity(lab.test_pixels), lab.test_labels) > 0.6


def test_real_images_are_nearer_to_real_ones_than_noise_is(lab):
    noise = torch.rand(256, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert lab.quality(noise).fid > 20 * lab.floor.fid
    assert lab.quality(noise).recall < 0.05
    assert lab.floor.precision > 0.8


def test_training_images_are_copies_and_unseen_ones_are_not(lab):
    assert lab.copied(intensity(lab.train_pixels[:256])).share == 1
    assert lab.copied(intensity(lab.test_pixels[:256])).share < 0


def test_figures_compare_at_one_number_of_images_only(lab):
    with pytest.raises(ValueError, match="compare at 256 only"):
        lab.quality(torch.zeros(10, 1, 28, 28))


def test_the_manifold_lies_at_equal_steps_of_probability(lab):
    plane = lab.trained(specs.two_latents(lab.scale, 0)).system
    grid = manifold(plane, 3)
    places = torch.special.ndtri(torch.tensor([1 / 6, 1 / 2, 5 / 6]))
    corner = torch.stack([places[0], places[2]])[None]  # leftmost, uppermost
    assert torch.allclose(grid[0], plane.decode(corner)[0], atol=1e-6)
    assert torch.allclose(grid[4], plane.decode(torch.zeros(1, 2))[0], atol=1e-6)


def test_data_without_labels_are_refused(data, tmp_path):
    with pytest.raises(LadderDataError, match="no labels"):
        climb.climb(HANDFUL, replace(data, train_labels=None), tmp_path)
    assert not any(tmp_path.iterdir())


def test_quick_and_full_have_the_sizes_that_they_promise():
    assert QUICK.train_images == 10_000
    assert QUICK.growing_images == (1_000, 3_000, 10_000)
    assert QUICK.samples >= 5_000
    assert FULL.train_images == 60_000
    assert FULL.growing_images == (1_000, 5_000, 60_000)
    assert FULL.samples >= 10_000
    assert FULL.seeds == (0, 1, 2)
    assert FULL.base == preset("mnist")
    for scale in (QUICK, FULL):
        assert {0.1, 0.3, 1, 2, 4, 8} <= set(scale.betas)
        assert scale.one_hot_images == (1, 4, 16, 64)
        assert (scale.vector_sizes[0], scale.vector_sizes[-1]) == (1, 16)


def test_several_seeds_are_held_to_the_bound_one_by_one_and_shown_as_mean_and_spread():
    claim = Claim.at_most("It is small.", "size", (1.0, 2.0, 6.0), 3.0)
    assert claim.figure == pytest.approx(3.0)
    assert not claim.held
    assert Claim.at_most("It is small.", "size", (1.0, 2.0, 2.5), 3.0).held
    assert not Claim.at_least("It is a number.", "size", (float("nan"),), 0.0).held
    assert in_words((1.0, 2.0, 6.0)) == "3 ± 2.6"
    assert in_words((1000.0, 2000.0, 3000.0)) == "2 000 ± 1 000"
    assert in_words((0.0001, 0.0002)) == "0.00015 ± 7.1e-05"
    assert in_words(10_000) == "10 000"


def test_pictures_of_one_seed_say_so_and_charts_of_several_name_them(few, tmp_path, monkeypatch):
    notes: dict[str, str] = {}

    def noted(draw, path, *arguments, note, **options):
        notes[path.name] = note
        return draw(path, *arguments, note=note, **options)

    for name in ("image_rows", "image_panels", "chart"):
        monkeypatch.setattr(figures_ladder, name, functools.partial(noted, getattr(figures_ladder, name)))
    small = HANDFUL.model_copy(update={"constant_steps": 5, "one_hot_steps": 5, "seeds": (0, 1)})
    climb.climb(small, few, tmp_path, numbers=(1, 2), device="cpu", workers=1)
    assert {name for name, note in notes.items() if "seed 0" in note} == {
        "01-over-training.png",
        "02-memorised.png",
        "02-unseen.png",
    }
    assert {name for name, note in notes.items() if "seeds 0 and 1" in note} == {"01-error.png", "02-steps.png"}
    report = (tmp_path / climb.REPORT).read_text()
    assert "A claim holds if it does for every seed" in report
    assert "Seed by seed: " in report


def test_pictures_of_another_run_are_not_taken_for_a_steps_own(few, tmp_path):
    small = HANDFUL.model_copy(update={"constant_steps": 5})
    climb.climb(small, few, tmp_path, numbers=(1,), device="cpu")
    assert climb.unfinished(Lab(small.within(few), few, tmp_path), [1]) == []
    (tmp_path / "01-error.png").write_bytes(b"of a run with other sizes")
    assert [step.number for step in climb.unfinished(Lab(small.within(few), few, tmp_path), [1])] == [1]


def test_the_command_runs_the_named_steps(tmp_path, capsys, monkeypatch):
    small = HANDFUL.model_copy(update={"constant_steps": 5, "one_hot_steps": 5})
    monkeypatch.setattr("vaeserve_training.commands.ladder.QUICK", small)
    images = ["--data.dataset", "arrays", "--data.path", str(MNIST_SUBSET)]
    assert main(["ladder", "--steps", "1,2", "--out", str(tmp_path), "--device", "cpu", "--quiet", *images]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.html'}\n"
    found = json.loads((tmp_path / "results.json").read_bytes())
    assert [step["number"] for step in found["steps"]] == [1, 2]


def test_the_command_names_steps_that_do_not_exist(capsys):
    assert main(["ladder", "--steps", "1,12"]) == 2
    assert "steps" in capsys.readouterr().err


def test_the_report_holds_everything_and_says_what_does_not_hold(results, folder):
    report = (folder / climb.REPORT).read_text()
    assert report.count("data:image/png;base64,") == sum(len(step["pictures"]) for step in results.values())
    for step in results.values():
        for claim in step["claims"]:
            assert page.escape(claim["claim"]) in report
        for table in step["tables"]:
            assert all(page.escape(text) in report for text in (table["title"], table["note"], *table["columns"]))
    broken = sum(not claim["held"] for step in results.values() for claim in step["claims"])
    assert report.count(">does not hold<") == broken > 0
    assert "http://" not in report
    assert "https://" not in report


def test_the_report_escapes_what_it_is_told(data, tmp_path):
    small = HANDFUL.model_copy(update={"constant_steps": 5, "name": "<script>alert(1)</script>"})
    climb.climb(small, data, Path(tmp_path), numbers=(1,), device="cpu")
    assert "<script>" not in (tmp_path / climb.REPORT).read_text()


@pytest.mark.usefixtures("results")
def test_the_report_opens_without_a_complaint_or_an_outside_request(folder, tmp_path):
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    report = (folder / climb.REPORT).as_uri()
    loaded = "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
    opened = open_page(browser, report, tmp_path / "profile", loaded)
    assert report in opened.requests
    assert [url for url in opened.requests if url != report and not url.startswith("data:")] == []
    assert opened.complaints == []
    assert len(opened.value) > len(STEPS)
    assert all(opened.value)


def test_a_browser_would_complain_of_a_page_that_reaches_out(tmp_path):
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    page_file = tmp_path / "page.html"
    page_file.write_text('<img src="http://127.0.0.1:9/none.png"><script>console.error("no")</script>')
    opened = open_page(browser, page_file.as_uri(), tmp_path / "profile", "1")
    assert "http://127.0.0.1:9/none.png" in opened.requests
    assert len(opened.complaints) >= 2

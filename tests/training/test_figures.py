"""The pictures show the pixels they were given, and the latents' real principal components."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from vaeserve_training import figures

RNG = np.random.default_rng(0)


def read(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def contains(picture: NDArray[np.uint8], pixels: NDArray[np.uint8], factor: int) -> tuple[int, int]:
    """Return where `pixels` (C, H, W), each a square of factor x factor, stand in the picture; fail if nowhere."""
    block = np.broadcast_to(pixels.transpose(1, 2, 0), (*pixels.shape[1:], 3))
    block = block.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width, _ = block.shape
    corners = picture[: 1 - height, : 1 - width], picture[height - 1 :, width - 1 :]
    matches = (corners[0] == block[0, 0]).all(axis=2) & (corners[1] == block[-1, -1]).all(axis=2)
    found = [
        (int(y), int(x))
        for y, x in np.argwhere(matches)
        if np.array_equal(picture[y : y + height, x : x + width], block)
    ]
    assert len(found) == 1, f"the image stands at {found}"
    return found[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_shown_row_by_row_pixel_for_pixel(channels: int, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (6, channels, 28, 28), dtype=np.uint8)
    picture = read(figures.sample_grid(images, tmp_path / "deep" / "samples.png", columns=3, title="six samples"))
    places = [contains(picture, image, factor=3) for image in images]
    assert sorted(places) == places, "from left to right, from top to bottom"
    assert len({y for y, _ in places}) == 2
    assert len({x for _, x in places}) == 3


def test_a_reconstruction_stands_right_below_its_original(tmp_path: Path) -> None:
    originals = RNG.integers(0, 256, (5, 1, 28, 28), dtype=np.uint8)
    reconstructed = RNG.integers(0, 256, (5, 1, 28, 28), dtype=np.uint8)
    picture = read(figures.reconstructions(originals, reconstructed, tmp_path / "pairs.png", columns=3))
    for original, below in zip(originals, reconstructed, strict=True):
        (upper, left), (lower, lower_left) = contains(picture, original, 3), contains(picture, below, 3)
        assert (lower_left, lower - upper) == (left, 3 * 28 + 3)


def test_floats_are_the_same_as_their_levels(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    levels = read(figures.sample_grid(images, tmp_path / "levels.png"))
    floats = read(figures.sample_grid((images / 255).astype(np.float32), tmp_path / "floats.png"))
    assert np.array_equal(levels, floats)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 28, 28), np.uint8), r"images have shape \(2, 28, 28\); expected \(N, 1, H, W\)"),
        (np.zeros((0, 1, 28, 28), np.uint8), "N >= 1"),
        (np.zeros((2, 2, 28, 28), np.uint8), r"expected \(N, 1, H, W\) or \(N, 3, H, W\)"),
        (np.full((2, 1, 28, 28), 1.5), r"values outside 0\.\.1"),
        (np.full((2, 1, 28, 28), np.nan), r"values outside 0\.\.1"),
        (np.zeros((2, 1, 28, 28), np.int64), "images are int64"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images: NDArray[np.uint8], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        figures.sample_grid(images, tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


def test_as_many_reconstructions_as_originals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="they must be equal"):
        figures.reconstructions(
            np.zeros((2, 1, 8, 8), np.uint8), np.zeros((3, 1, 8, 8), np.uint8), tmp_path / "none.png"
        )


def test_principal_components_find_known_axes() -> None:
    coordinates = RNG.standard_normal((4000, 3)) * [5.0, 2.0, 0.5]
    turn, _ = np.linalg.qr(RNG.standard_normal((3, 3)))
    points, explained = figures.principal_components(coordinates @ turn.T + 7)
    expected = coordinates - coordinates.mean(axis=0)
    for component in range(2):
        assert abs(np.corrcoef(points[:, component], expected[:, component])[0, 1]) > 0.999
    variances = np.array([25.0, 4.0, 0.25])
    assert explained == pytest.approx(variances[:2] / variances.sum(), rel=0.1)


def test_the_sign_of_a_component_does_not_depend_on_the_order_of_the_rows() -> None:
    means = RNG.standard_normal((100, 5)) * [3, 2, 1, 1, 1]
    points, _ = figures.principal_components(means)
    reversed_points, _ = figures.principal_components(means[::-1])
    assert reversed_points[::-1] == pytest.approx(points)


def test_a_collapsed_posterior_explains_nothing() -> None:
    points, explained = figures.principal_components(np.full((10, 4), 0.25, dtype=np.float32))
    assert (np.abs(points).max(), explained.tolist()) == (0, [0, 0])


@pytest.mark.parametrize("means", [np.zeros((1, 4)), np.zeros((9, 1)), np.full((9, 4), np.nan)])
def test_too_few_or_infinite_means_are_refused(means: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="at least 2 rows of at least 2 finite latents are needed"):
        figures.principal_components(means)


def colour_shares(picture: NDArray[np.uint8]) -> Callable[[str], int]:
    return lambda colour: int((picture == np.rint(np.array(to_rgb(colour)) * 255)).all(axis=2).sum())


def test_each_class_has_its_own_colour(tmp_path: Path) -> None:
    means = RNG.standard_normal((300, 2, 2, 2))  # latents that are maps
    share = colour_shares(
        read(figures.latent_space(means, np.arange(300) % 3, tmp_path / "latents.png", title="means"))
    )
    assert all(share(colour) > 20 for colour in figures.PALETTE[:3])
    assert all(share(colour) == 0 for colour in figures.PALETTE[3:-1])


@pytest.mark.parametrize("names", [None, [f"kind of thing {number}" for number in range(14)]])
def test_more_classes_than_colours_and_no_classes_at_all(names: list[str] | None, tmp_path: Path) -> None:
    means = RNG.standard_normal((140, 6)).astype(np.float32)
    labels = None if names is None else np.arange(140) % 14
    picture = read(figures.latent_space(means, labels, tmp_path / "latents.png", class_names=names))
    share = colour_shares(picture)
    assert share(figures.PALETTE[9]) > 0 or names is None
    assert share("#ffffff") < picture.shape[0] * picture.shape[1]


def test_labels_are_one_for_each_mean(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels have shape \(9,\); 10 means take \(10,\)"):
        figures.latent_space(RNG.standard_normal((10, 4)), np.zeros(9, dtype=np.int64), tmp_path / "none.png")


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    means, labels = RNG.standard_normal((50, 4)), np.arange(50) % 5
    first, second = (figures.latent_space(means, labels, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second

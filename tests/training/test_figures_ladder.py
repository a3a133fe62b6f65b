"""The ladder's pictures: images pixel for pixel where they belong, charts that show what they are given."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vaeserve_training import figures_ladder as figures
from vaeserve_training.figures_ladder import Bars, ImageRow, Panel, Series


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def place_of(image: np.ndarray, page: np.ndarray) -> tuple[int, int]:
    """Return where (row, column) the image, doubled, stands on the page; fail unless there is exactly one place."""
    doubled = image[0].repeat(2, axis=0).repeat(2, axis=1)
    grey = page[:, :, 0]
    found = [
        (y, x) for y, x in np.argwhere(grey == doubled[0, 0]) if np.array_equal(grey[y : y + 56, x : x + 56], doubled)
    ]
    assert len(found) == 1
    return found[0]


def test_rows_of_images_stand_pixel_for_pixel_in_their_order(tmp_path):
    upper, lower = images(3), images(2, seed=1)
    path = figures.image_rows(
        tmp_path / "rows.png",
        [ImageRow("upper", upper), ImageRow("lower", lower)],
        columns=["a", "b", "c"],
        note="made so",
    )
    page = pixels_of(path)
    above, below = [place_of(image, page) for image in upper], [place_of(image, page) for image in lower]
    assert len({y for y, _ in above}) == len({y for y, _ in below}) == 1
    assert above[0][0] < below[0][0]
    assert [x for _, x in above] == sorted(x for _, x in above)
    assert [x for _, x in above][:2] == [x for _, x in below]


def test_panels_stand_side_by_side(tmp_path):
    left, right = images(4), images(4, seed=1)
    page = pixels_of(
        figures.image_panels(tmp_path / "panels.png", [("left", left), ("right", right)], columns=2, note="")
    )
    places = [place_of(image, page) for image in (*left, *right)]
    assert places[0][0] == places[1][0] == places[4][0] < places[2][0]
    assert places[0][1] == places[2][1] < places[1][1] < places[4][1]


def test_without_a_gap_images_touch(tmp_path):
    pair = images(2)
    page = pixels_of(figures.image_panels(tmp_path / "plane.png", [("", pair)], columns=2, note="", gap_px=0))
    (_, first), (_, second) = (place_of(image, page) for image in pair)
    assert second - first == 56


def test_a_long_note_is_not_cut_off(tmp_path):
    rows = [ImageRow("", images(1))]
    short = pixels_of(figures.image_rows(tmp_path / "short.png", rows, note="a few words"))
    long = pixels_of(figures.image_rows(tmp_path / "long.png", rows, note="many words " * 40))
    assert long.shape[1] == short.shape[1]
    assert long.shape[0] > short.shape[0] + 50
    assert (long[:, -8:] == 255).all()


@pytest.mark.parametrize("wrong", [np.zeros((2, 28, 28)), np.zeros((1, 2, 4, 4)), np.full((1, 1, 4, 4), 1.5)])
def test_what_is_no_image_is_refused_by_its_label(tmp_path, wrong):
    with pytest.raises(ValueError, match="strange"):
        figures.image_rows(tmp_path / "wrong.png", [ImageRow("strange", wrong)], note="")
    assert not (tmp_path / "wrong.png").exists()


def drawn_by(monkeypatch, draw) -> Figure:
    """Return the figure that `draw` would have written."""
    kept: list[Figure] = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure) or path)
    draw()
    return kept[0]


def test_a_chart_shows_every_series_its_references_and_the_note(monkeypatch, tmp_path):
    panel = Panel(
        title="title",
        x_label="steps",
        y_label="nats",
        series=[
            Series("one", [1, 10, 100], [5.0, 4.0, 3.0]),
            Series.over_seeds("two", [1, 10, 100], [(1.0, 3.0), (2.0, 2.0), (0.0, 4.0)]),
        ],
        references=[("floor", 0.5)],
        log_x=True,
        x_ticks=[1, 10, 100],
    )
    figure = drawn_by(monkeypatch, lambda: figures.chart(tmp_path / "chart.png", [panel, panel], note="made with care"))
    assert len(figure.axes) == 2
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("steps", "nats", "log")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert axes.lines[0].get_ydata().tolist() == [5.0, 4.0, 3.0]
    assert any(list(line.get_ydata()) == [2.0, 2.0, 2.0] for line in axes.lines)  # the means over seeds
    assert any(list(line.get_ydata()) == [0.5, 0.5] for line in axes.lines)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "10", "100"]
    assert figure.get_supxlabel() == "made with care"


def test_series_over_one_seed_have_no_spread():
    assert Series.over_seeds("", [1, 2], [(3.0,), (4.0,)]) == Series("", [1, 2], [3.0, 4.0])
    assert Series.over_seeds("", [1], [(1.0, 3.0)]).spread == pytest.approx([2**0.5])


def test_bars_are_as_long_as_their_figures(monkeypatch, tmp_path):
    bars = Bars("distance", "nats", [(1.0, 3.0), (5.0, 5.0)])
    figure = drawn_by(
        monkeypatch, lambda: figures.bar_chart(tmp_path / "bars.png", ["first", "second"], [bars], note="")
    )
    assert [patch.get_width() for patch in figure.axes[0].patches] == [2.0, 5.0]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["first", "second"]


def test_a_bar_that_no_seed_changes_has_no_spread(monkeypatch, tmp_path):
    bars = Bars("distance", "nats", [(1.0, 3.0), (5.0,)])
    figure = drawn_by(monkeypatch, lambda: figures.bar_chart(tmp_path / "bars.png", ["three", "one"], [bars], note=""))
    (errors,) = figure.axes[0].containers[0].lines[2]
    ends = [segment[:, 0].tolist() for segment in errors.get_segments()]
    assert ends == [pytest.approx([2 - 2**0.5, 2 + 2**0.5]), [5.0, 5.0]]


def test_equal_data_give_equal_bytes(tmp_path):
    panel = Panel(x_label="x", y_label="y", series=[Series("", [1, 2], [1, 2])])
    first, second = (figures.chart(tmp_path / name, [panel], note="n").read_bytes() for name in ("a.png", "b.png"))
    assert first == second

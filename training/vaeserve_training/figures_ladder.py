"""The ladder's pictures: labelled rows and panels of images, and charts, each with the sizes it was made with.

The look is that of figures.py; here are the forms that comparisons need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from vaeserve_training.figures import (
    DPI,
    MARKERS,
    PALETTE,
    TEXT_COLOUR,
    Images,
    as_pixels,
    figure_of,
    save,
    style_axes,
    write_text,
)

_MARGIN_PX = 14
_GAP_PX = 3
_PANEL_GAP_PX = 28
_LINE_PX = 17  # a line of text
_LABEL_POINTS = 9
_NOTE_POINTS = 8
_HINTING = 1.06  # small letters are moved to whole pixels, which makes lines wider than their outlines
_TARGET_TILE_PX = 56
_MIN_WIDTH_PX = 560  # narrower, and the note would take many lines
_PANEL_INCHES = (4.6, 3.5)
_MOST_MARKERS = 25  # points of a line above which markers would hide it
_FEW_DECADES = 200  # ratio of an axis's ends below which powers of ten alone are too few ticks
_OVER_LINES = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
# From the palette, dark enough for lines on white and told apart with every common kind of colour blindness.
_LINE_COLOURS = (PALETTE[0], PALETTE[6], PALETTE[3], PALETTE[4], PALETTE[7], PALETTE[2])


class ImageRow(NamedTuple):
    """A label and the images behind it, (N, C, H, W)."""

    label: str
    images: Images


def image_rows(path: Path, rows: Sequence[ImageRow], *, columns: Sequence[str] = (), note: str) -> Path:
    """Write labelled rows of images, pixel for pixel, as a PNG file; return its path.

    Rows may differ in length. `columns` are labels above the images, `note` stands below all.
    """
    tiles = [as_pixels(row.images, row.label or "images") for row in rows]
    size = _Tile(tiles[0].shape[1], tiles[0].shape[2])
    left = _MARGIN_PX + max(_label_px(row.label) for row in rows)
    top = _MARGIN_PX + (_LINE_PX if columns else 0)
    width = left + max(len(images) for images in tiles) * size.column_px + _MARGIN_PX
    canvas = _Canvas(width, top + len(rows) * size.row_px + _MARGIN_PX, note)
    for number, (row, images) in enumerate(zip(rows, tiles, strict=True)):
        y = top + number * size.row_px
        canvas.tiles(images, left, y, size, columns=len(images))
        canvas.write(left - 10, y + size.row_px / 2, row.label, ha="right")
    for number, label in enumerate(columns):
        canvas.write(left + (number + 0.5) * size.column_px, top - _LINE_PX / 2 - 2, label, ha="center")
    return canvas.save(path)


def image_panels(
    path: Path, panels: Sequence[tuple[str, Images]], *, columns: int, note: str, gap_px: int = _GAP_PX
) -> Path:
    """Write grids of images side by side, each under its title, as a PNG file; return its path."""
    tiles = [as_pixels(images, title) for title, images in panels]
    size = _Tile(tiles[0].shape[1], tiles[0].shape[2], gap_px)
    top = _MARGIN_PX + _LINE_PX
    panel_px = columns * size.column_px
    width = 2 * _MARGIN_PX + len(panels) * (panel_px + _PANEL_GAP_PX) - _PANEL_GAP_PX
    height = top + max(-(-len(images) // columns) for images in tiles) * size.row_px + _MARGIN_PX
    canvas = _Canvas(width, height, note)
    for number, ((title, _), images) in enumerate(zip(panels, tiles, strict=True)):
        left = _MARGIN_PX + number * (panel_px + _PANEL_GAP_PX)
        canvas.tiles(images, left, top, size, columns=columns)
        canvas.write(left, top - _LINE_PX / 2 - 2, title, ha="left")
    return canvas.save(path)


@dataclass(frozen=True)
class _Tile:
    """The size of an enlarged image with the gap after it."""

    height: int
    width: int
    gap_px: int = _GAP_PX

    @property
    def factor(self) -> int:
        """Whole number of screen pixels for a pixel."""
        return max(1, round(_TARGET_TILE_PX / max(self.height, self.width)))

    @property
    def row_px(self) -> int:
        return self.height * self.factor + self.gap_px

    @property
    def column_px(self) -> int:
        return self.width * self.factor + self.gap_px


class _Canvas:
    """White paper counted in pixels from the top left corner, with a note at its foot."""

    def __init__(self, width: int, height: int, note: str) -> None:
        width = max(width, _MIN_WIDTH_PX)
        lines = _wrap(note, width - 2 * _MARGIN_PX)
        self.pixels = np.full((height + len(lines) * _LINE_PX, width, 3), 255, dtype=np.uint8)
        self.texts: list[tuple[float, float, str, int, str]] = []
        for number, line in enumerate(lines):
            self.write(_MARGIN_PX, height + (number + 0.2) * _LINE_PX, line, ha="left", fontsize=_NOTE_POINTS)

    def tiles(self, images: NDArray[np.uint8], left: int, top: int, size: _Tile, *, columns: int) -> None:
        for number, image in enumerate(images):
            row, column = divmod(number, columns)
            x, y = left + column * size.column_px, top + row * size.row_px
            enlarged = image.repeat(size.factor, axis=0).repeat(size.factor, axis=1)
            self.pixels[y : y + enlarged.shape[0], x : x + enlarged.shape[1]] = enlarged

    def write(self, x_px: float, y_px: float, text: str, *, ha: str, fontsize: int = _LABEL_POINTS) -> None:
        self.texts.append((x_px, y_px, text, fontsize, ha))

    def save(self, path: Path) -> Path:
        figure = figure_of(self.pixels)
        for x_px, y_px, text, fontsize, ha in self.texts:
            write_text(figure, x_px, y_px, text, self.pixels.shape, fontsize=fontsize, ha=ha)
        return save(figure, path)


def _label_px(text: str) -> int:
    """Return the width that a label takes with the gap after it."""
    return round(_text_px(text, _LABEL_POINTS)) + 12 if text else 0


def _text_px(text: str, points: int) -> float:
    return sum(_advance(letter) for letter in text) * points * _HINTING * DPI / 72


@cache
def _advance(letter: str) -> float:
    """Return how far a letter moves the next one, as a share of the font's size. Outlining whole lines is slow."""
    outlines = [TextPath((0, 0), text, size=1).get_extents() for text in (f"|{letter}|", "||")]
    return float(outlines[0].width - outlines[1].width)


def _wrap(note: str, width_px: float) -> list[str]:
    """Return the note in lines that are no wider than that."""
    lines: list[str] = []
    for word in note.split():
        if lines and _text_px(f"{lines[-1]} {word}", _NOTE_POINTS) <= width_px:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


Colour = str | tuple[float, float, float, float]


@dataclass(frozen=True)
class Series:
    """Points of one kind; `spread` is the standard deviation over seeds, drawn as error bars."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()
    style: Literal["line", "dots"] = "line"
    names: Sequence[str] = ()
    """A few words beside each point."""
    colour: int | None = None
    """Place of its colour and marker; by default its own among the panel's series."""

    @classmethod
    def over_seeds(
        cls, label: str, x: Sequence[float], figures: Sequence[Sequence[float]], *, colour: int | None = None
    ) -> Self:
        """Return the means and standard deviations of several figures for each x, one per seed."""
        several = len(figures[0]) > 1
        spread = [_spread(values) for values in figures] if several else ()
        return cls(label, list(x), [float(np.mean(values)) for values in figures], spread, colour=colour)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation over the seeds, 0 for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    title: str = ""
    references: Sequence[tuple[str, float]] = field(default=())
    """Labelled horizontal lines: bounds and limits."""
    log_x: bool = False
    log_y: bool = False
    x_ticks: Sequence[float] = ()
    ordered: bool = False
    """The series are steps of one quantity, so their colours are, too; one legend serves all panels."""
    diagonal: bool = False
    """Draw where y equals x."""


def chart(path: Path, panels: Sequence[Panel], *, note: str) -> Path:
    """Write charts side by side as a PNG file; return its path."""
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), dpi=DPI, layout="constrained", facecolor="white")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _draw_panel(axes, panel)
    if panels[-1].ordered:  # many series, the same in every panel: one legend, beside the last
        figure.axes[-1].legend(
            frameon=False, fontsize=8, labelcolor=TEXT_COLOUR, loc="upper left", bbox_to_anchor=(1, 1)
        )
    _write_note(figure, note)
    return save(figure, path)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    colours = _ordered_colours(len(panel.series)) if panel.ordered else _LINE_COLOURS
    for number, series in enumerate(panel.series):
        place = number if series.colour is None else series.colour
        _draw_series(axes, series, colours[place % len(colours)], MARKERS[place % len(MARKERS)])
    if panel.diagonal:
        axes.axline((0, 0), slope=1, color="#888888", linewidth=1, linestyle="--")
    for label, value in panel.references:
        axes.axhline(value, color="#555555", linewidth=1, linestyle="--")
        axes.annotate(label, (0, value), xycoords=("axes fraction", "data"), xytext=(4, 6), ha="left", fontsize=8,
                      textcoords="offset points", color="#555555", bbox=_OVER_LINES)  # fmt: skip
    for axis, is_log in ((axes.xaxis, panel.log_x), (axes.yaxis, panel.log_y)):
        if is_log:
            _label_log_axis(axis)
    if not panel.log_x and all(isinstance(x, int) for series in panel.series for x in series.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.x_ticks:
        axes.set_xticks(list(panel.x_ticks), [f"{tick:g}" for tick in panel.x_ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    style_axes(axes, panel.title)
    if sum(bool(series.label) for series in panel.series) > 1 and not panel.ordered:
        axes.legend(framealpha=0.8, edgecolor="none", fontsize=8, labelcolor=TEXT_COLOUR)


def _draw_series(axes: Axes, series: Series, colour: Colour, marker: str) -> None:
    if series.style == "dots":
        axes.scatter(series.x, series.y, s=7, color=colour, alpha=0.5, linewidths=0, label=series.label)
    else:
        size = 0 if len(series.x) > _MOST_MARKERS else 4
        axes.plot(series.x, series.y, color=colour, marker=marker, markersize=size, linewidth=1.6, label=series.label)
    if series.spread:
        axes.errorbar(series.x, series.y, yerr=series.spread, fmt="none", ecolor=colour, capsize=3, linewidth=1)
    for name, x, y in zip(series.names, series.x, series.y, strict=False):
        axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8, color=TEXT_COLOUR)
    if series.names:
        axes.margins(x=0.2, y=0.12)


def _label_log_axis(axis: Axis) -> None:
    """Write plain numbers, and enough of them where the axis spans few powers of ten."""
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high / low < _FEW_DECADES else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True)
class Bars:
    """A figure for each of several things, one value per seed, or a single one where no seed enters."""

    title: str
    x_label: str
    values: Sequence[Sequence[float]]


def bar_chart(path: Path, names: Sequence[str], panels: Sequence[Bars], *, note: str) -> Path:
    """Write horizontal bars side by side, the names once at their left, as a PNG file; return its path."""
    width, _ = _PANEL_INCHES
    figure = Figure(
        figsize=(1.5 + 0.8 * width * len(panels), 1.4 + 0.42 * len(names)),
        dpi=DPI,
        layout="constrained",
        facecolor="white",
    )
    rows = np.arange(len(names))[::-1]
    for number, (axes, panel) in enumerate(zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True)):
        means = [float(np.mean(values)) for values in panel.values]
        spread = (
            [_spread(values) for values in panel.values] if any(len(values) > 1 for values in panel.values) else None
        )
        axes.barh(rows, means, xerr=spread, height=0.6, color=PALETTE[1], ecolor=TEXT_COLOUR, capsize=3)
        for row, value in zip(rows, means, strict=True):
            axes.annotate(
                f"{value:.3g}", (value, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(rows, names if number == 0 else [""] * len(names))
        axes.margins(x=0.18)
        axes.set_xlabel(panel.x_label)
        style_axes(axes, panel.title)
        axes.grid(visible=False, axis="y")
    _write_note(figure, note)
    return save(figure, path)


def _write_note(figure: Figure, note: str) -> None:
    width_px = figure.get_figwidth() * DPI
    wrapped = "\n".join(_wrap(note, width_px - 2 * _MARGIN_PX))
    figure.supxlabel(wrapped, x=_MARGIN_PX / width_px, ha="left", fontsize=_NOTE_POINTS, color=TEXT_COLOUR)


def _ordered_colours(count: int) -> list[tuple[float, float, float, float]]:
    """Return colours from dark to light, which keep their order in grey and for every eye."""
    return [colormaps["viridis"](0.85 * number / max(1, count - 1)) for number in range(count)]

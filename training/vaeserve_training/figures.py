"""The pictures a person judges a model by: reconstructions, samples, and the latents in two dimensions.

They take NumPy arrays and nothing else, so that they can draw what came from a file, a module or a server alike.
Images are drawn pixel for pixel, enlarged by a whole factor: a filter would hide or invent blur, which is what one
looks for in the output of a VAE.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from vaeserve_training import atomic

DPI = 100
TEXT_COLOUR = "#222222"
_MARGIN_PX = 16
_TITLE_PX = 26
_LABEL_PX = 110
_GAP_PX = 3
_GROUP_GAP_PX = 12
_SHORT_NAME = 3  # characters that do not cover much of the picture
_TARGET_TILE_PX = 84  # an image is enlarged to about this size

# Paul Tol's "muted" scheme, told apart with every common kind of colour blindness, and black for the tenth class.
PALETTE = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#000000",
)  # fmt: skip
MARKERS = ("o", "^", "s", "D")  # a further one for each ten classes

Images = NDArray[np.uint8] | NDArray[np.floating]


def reconstructions(
    originals: Images, reconstructed: Images, path: Path, *, columns: int = 12, title: str = ""
) -> Path:
    """Write rows of originals, each over the row of their reconstructions, as a PNG file; return its path.

    Both are (N, C, H, W), C = 1 or 3, uint8 0..255 or floating point 0..1. Raises ValueError for other arrays.
    """
    upper, lower = as_pixels(originals, "originals"), as_pixels(reconstructed, "reconstructed")
    if upper.shape != lower.shape:
        raise ValueError(f"originals have shape {upper.shape} and reconstructed ones {lower.shape}; they must be equal")
    rows: list[NDArray[np.uint8]] = []
    for first in range(0, len(upper), columns):
        rows += [upper[first : first + columns], lower[first : first + columns]]
    return _draw_rows(rows, path, group_labels=("original", "reconstruction"), title=title)


def sample_grid(images: Images, path: Path, *, columns: int = 8, title: str = "") -> Path:
    """Write images row by row as a PNG file; return its path.

    `images` are (N, C, H, W), C = 1 or 3, uint8 0..255 or floating point 0..1. Raises ValueError for other arrays.
    """
    pixels = as_pixels(images, "images")
    rows = [pixels[first : first + columns] for first in range(0, len(pixels), columns)]
    return _draw_rows(rows, path, title=title)


def latent_space(
    means: NDArray[np.floating],
    labels: NDArray[np.integer] | None,
    path: Path,
    *,
    class_names: Sequence[str] | None = None,
    title: str = "",
) -> Path:
    """Write posterior means in their first two principal components as a PNG file; return its path.

    `means` are (N, *latent_shape) with at least 2 latents, `labels` (N,) the number of each one's class, `class_names`
    the names of classes 0, 1, .... The axes say how much of the variance each component explains. Raises ValueError for
    other arrays.
    """
    points, explained = principal_components(means)
    if labels is not None and labels.shape != (len(points),):
        raise ValueError(f"labels have shape {labels.shape}; {len(points)} means take ({len(points)},)")
    figure = Figure(figsize=(8, 7), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=5, color=PALETTE[0], alpha=0.5, linewidths=0)
    else:
        _scatter_classes(figure, points, labels, class_names)
    for axis, name, share in zip((axes.xaxis, axes.yaxis), ("first", "second"), explained, strict=True):
        axis.set_label_text(f"{name} principal component ({share:.1%} of the variance)")
    axes.set_aspect("equal", adjustable="datalim")
    style_axes(axes, title)
    return save(figure, path)


def principal_components(means: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the means in their first two principal components, (N, 2), and the share of variance of each, (2,).

    The sign of a component is chosen so that its largest weight is positive: a picture does not flip between runs.
    """
    rows = np.asarray(means, dtype=np.float64).reshape(len(means), -1)
    if len(rows) < 2 or rows.shape[1] < 2 or not np.isfinite(rows).all():
        raise ValueError(f"means have shape {means.shape}; at least 2 rows of at least 2 finite latents are needed")
    centred = rows - rows.mean(axis=0)
    variances, vectors = np.linalg.eigh(centred.T @ centred / len(rows))
    vectors = vectors[:, :-3:-1]  # eigh sorts upwards
    vectors = vectors * np.where(vectors[np.abs(vectors).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    total = max(float(variances.sum()), np.finfo(np.float64).tiny)
    return centred @ vectors, np.maximum(variances[:-3:-1], 0) / total


def _scatter_classes(
    figure: Figure, points: NDArray[np.float64], labels: NDArray[np.integer], class_names: Sequence[str] | None
) -> None:
    """Draw each class in its own colour, short names at their class's median too, and a legend."""
    axes = figure.axes[0]
    classes = np.unique(labels)
    styles = {
        number: (PALETTE[i % len(PALETTE)], MARKERS[i // len(PALETTE) % len(MARKERS)])
        for i, number in enumerate(classes)
    }
    colours = np.array([styles[number][0] for number in labels])
    markers = np.array([styles[number][1] for number in labels])
    for marker in np.unique(markers):
        # All classes of a marker at once, in the data's own order, so that none lies on top of the others.
        chosen = markers == marker
        x, y = points[chosen].T
        axes.scatter(x, y, s=7, c=colours[chosen].tolist(), marker=marker, alpha=0.6, linewidths=0)
    names = {number: str(number) if class_names is None else class_names[number] for number in classes}
    handles = []
    for number, (colour, marker) in styles.items():
        handles.append(Line2D([], [], linestyle="", marker=marker, markersize=8, color=colour, label=names[number]))
        if max(map(len, names.values())) <= _SHORT_NAME:
            x, y = np.median(points[labels == number], axis=0)
            box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": colour, "linewidth": 2}
            axes.text(x, y, names[number], color=TEXT_COLOUR, fontsize=12, ha="center", va="center", bbox=box)
    figure.legend(handles=handles, loc="outside right center", frameon=False, labelcolor=TEXT_COLOUR, fontsize=11)


def style_axes(axes: Axes, title: str = "") -> None:
    """Give axes the project's look: readable ticks, a faint grid behind the data, nothing that is no data."""
    axes.tick_params(colors=TEXT_COLOUR, labelsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(TEXT_COLOUR)
    if title:
        axes.set_title(title, color=TEXT_COLOUR, fontsize=12, loc="left")


def as_pixels(images: Images, name: str) -> NDArray[np.uint8]:
    """Return images as uint8 (N, H, W, 3); ValueError if they are none."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"{name} have shape {images.shape}; expected (N, 1, H, W) or (N, 3, H, W), N >= 1")
    if np.issubdtype(images.dtype, np.floating):
        if not ((images >= 0) & (images <= 1)).all():
            raise ValueError(f"{name} are {images.dtype} with values outside 0..1")
        images = np.rint(images * 255).astype(np.uint8)
    elif images.dtype != np.uint8:
        raise ValueError(f"{name} are {images.dtype}; expected uint8 (0..255) or floating point (0..1)")
    return np.broadcast_to(images.transpose(0, 2, 3, 1), (len(images), *images.shape[2:], 3))


def _draw_rows(
    rows: list[NDArray[np.uint8]], path: Path, *, group_labels: tuple[str, ...] = (), title: str = ""
) -> Path:
    """Write rows of images (n, H, W, 3) one below the other, pixel for pixel.

    With `group_labels` so many rows form a group, whose rows are labelled by them.
    """
    height, width = rows[0].shape[1:3]
    factor = max(1, round(_TARGET_TILE_PX / max(height, width)))
    row_px, column_px = height * factor + _GAP_PX, width * factor + _GAP_PX
    left = _MARGIN_PX + (_LABEL_PX if group_labels else 0)
    top = _MARGIN_PX + (_TITLE_PX if title else 0)
    per_group = len(group_labels) or len(rows)
    tops = [top + number * row_px + number // per_group * _GROUP_GAP_PX for number in range(len(rows))]
    canvas_shape = (tops[-1] + row_px - _GAP_PX + _MARGIN_PX, left + len(rows[0]) * column_px - _GAP_PX + _MARGIN_PX, 3)
    canvas = np.full(canvas_shape, 255, dtype=np.uint8)
    for images, y in zip(rows, tops, strict=True):
        for column, image in enumerate(images):
            x = left + column * column_px
            enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
            canvas[y : y + height * factor, x : x + width * factor] = enlarged
    figure = figure_of(canvas)
    for number, y in enumerate(tops if group_labels else []):
        middle = y + height * factor / 2
        write_text(figure, left - 10, middle, group_labels[number % per_group], canvas_shape, fontsize=10, ha="right")
    if title:
        write_text(figure, left, top - _TITLE_PX / 2 - 4, title, canvas_shape, fontsize=12, ha="left")
    return save(figure, path)


def figure_of(canvas: NDArray[np.uint8]) -> Figure:
    """Return a figure whose pixels are those of `canvas`, (h, w, 3)."""
    height, width, _ = canvas.shape
    # Matplotlib cuts inches * dpi down to whole pixels: half a pixel more keeps rounding errors from losing one.
    figure = Figure(figsize=((width + 0.5) / DPI, (height + 0.5) / DPI), dpi=DPI, facecolor="white")
    figure.figimage(canvas)
    return figure


def write_text(
    figure: Figure, x_px: float, y_px: float, text: str, shape: tuple[int, ...], *, fontsize: int, ha: str
) -> None:
    """Write `text` at a place counted in pixels from the top left corner."""
    x, y = x_px / shape[1], 1 - y_px / shape[0]
    figure.text(x, y, text, color=TEXT_COLOUR, fontsize=fontsize, ha=ha, va="center")


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG file, whole or not at all, and return its path."""
    buffer = io.BytesIO()
    # Without the library's version in it, the same data give the same bytes for longer.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    atomic.write_file(path, buffer.getvalue())
    return path

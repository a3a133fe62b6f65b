"""What a step of the ladder found: claims with the figures that they stand or fall by, tables, and pictures.

The same object is the step's file on disk, its part of `results.json` and the source of the report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, computed_field

Relation = Literal["<=", ">="]
Figures = tuple[float, ...]  # one per seed
Cell = str | int | float | Figures


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class Claim(_Part):
    """A sentence of the explanation, made into a comparison that may fail."""

    claim: str
    """What is said."""
    measure: str
    """What the figure is, in words, with its unit."""
    figures: Figures
    """The figure for each seed."""
    relation: Relation
    """How the figure must stand to the bound."""
    bound: float
    """What it is compared with."""
    otherwise: str = ""
    """What to say if it does not hold."""

    @classmethod
    def at_most(cls, claim: str, measure: str, figures: Figures, bound: float, *, otherwise: str = "") -> Self:
        """Return the claim that every figure is at or below the bound."""
        return cls(claim=claim, measure=measure, figures=figures, relation="<=", bound=bound, otherwise=otherwise)

    @classmethod
    def at_least(cls, claim: str, measure: str, figures: Figures, bound: float, *, otherwise: str = "") -> Self:
        """Return the claim that every figure is at or above the bound."""
        return cls(claim=claim, measure=measure, figures=figures, relation=">=", bound=bound, otherwise=otherwise)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def figure(self) -> float:
        """Mean over the seeds."""
        return mean(self.figures)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def held(self) -> bool:
        """Whether the claim holds for every seed; never for a figure that is not a number."""
        if self.relation == "<=":
            return all(figure <= self.bound for figure in self.figures)
        return all(figure >= self.bound for figure in self.figures)


class Table(_Part):
    """Figures side by side; a cell with several is one per seed."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def latent_table(title: str, rows: Mapping[str, Sequence[Sequence[float]]]) -> Table:
    """Return a figure for each of D latents, a row for each system, which brings D figures for each seed."""
    latents = len(next(iter(rows.values()))[0])
    return Table(
        title=title,
        columns=("", *(str(rank + 1) for rank in range(latents))),
        rows=tuple(
            (name, *(tuple(of_seed[rank] for of_seed in of_row) for rank in range(latents)))
            for name, of_row in rows.items()
        ),
    )


class Picture(_Part):
    """A PNG file in the ladder's folder."""

    file: str
    caption: str


class Findings(_Part):
    """What a step has to show of itself."""

    sizes: str
    """The sizes that its figures were made with."""
    claims: tuple[Claim, ...]
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    remarks: tuple[str, ...] = ()
    """What the figures do not say by themselves, caveats included."""


class StepResult(Findings):
    """The same with its place in the ladder."""

    number: int
    title: str
    codes: str
    """Where the decoder's input comes from, in a sentence."""
    seconds: float
    """Time that went by, waiting for its networks included; those that were trained before took none."""


def mean(figures: Figures) -> float:
    """Return the mean over the seeds."""
    return math.fsum(figures) / len(figures)


def spread(figures: Figures) -> float:
    """Return the standard deviation over the seeds, 0 for a single one."""
    if len(set(figures)) < 2:
        return 0.0
    middle = mean(figures)
    return math.sqrt(math.fsum((figure - middle) ** 2 for figure in figures) / (len(figures) - 1))


def in_words(cell: Cell) -> str:
    """Return a cell as people read it: four digits, and `mean ± standard deviation` over several seeds, that in two."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return f"{cell:,}".replace(",", " ")
    if isinstance(cell, tuple):
        words = in_words(mean(cell))
        return f"{words} ± {_spread_in_words(cell)}" if len(cell) > 1 else words
    if abs(cell) >= 1000 or cell.is_integer():
        return in_words(round(cell))
    return f"{cell:.4g}"


def _spread_in_words(figures: Figures) -> str:
    found = spread(figures)
    return in_words(round(found)) if found >= 10 else f"{found:.2g}"


def ratios(figures: Figures, bases: Figures) -> Figures:
    """Return figure / base for each seed."""
    return tuple(figure / base for figure, base in zip(figures, bases, strict=True))


def differences(figures: Figures, bases: Figures) -> Figures:
    """Return figure - base for each seed."""
    return tuple(figure - base for figure, base in zip(figures, bases, strict=True))

"""The report: one HTML file that holds its pictures and asks nobody for anything.

The policy in its head forbids whatever is not in the file, so that a browser would say so if something were.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from vaeserve_training.data import ImageData
from vaeserve_training.ladder.results import Claim, StepResult, Table, in_words
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.wording import listed, number

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 0 auto;
  padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.8rem; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 0 0 .3rem; padding-top: 2.2rem; border-top: 1px solid #ccc; }
section { margin-top: 2.2rem; }
p { margin: .5rem 0; }
.sizes, caption, figcaption, .note { color: #555; font-size: .87rem; }
table { border-collapse: collapse; margin: 1rem 0 .3rem; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd; }
th { font-weight: 600; }
td.figure { font-variant-numeric: tabular-nums; white-space: nowrap; }
.held { color: #117733; font-weight: 600; white-space: nowrap; }
.broken { color: #882255; font-weight: 600; white-space: nowrap; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; border: 1px solid #eee; }
a { color: #332288; }
.wide { overflow-x: auto; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The ladder: from one memorised image to a VAE that generates</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<h1>From one memorised image to a VAE that generates</h1>
<p>{intro}</p>
{overview}
{sections}
</body>
</html>
"""


_SEVERAL = (
    "Figures are means over the seeds ± standard deviation. A claim holds if it does for every seed; where it does "
    "not, the seeds' own figures are given. "
)


def render(results: Sequence[StepResult], scale: Scale, data: ImageData, folder: Path) -> str:
    """Return the report on these steps as HTML; their pictures are read from `folder`."""
    intro = (
        f"One decoder and one training loop serve all steps; a step differs in where the decoder's code comes from. "
        f"Sizes: {scale.name}, up to {number(scale.train_images)} training images of {data.name}, "
        f"seed{'s' * (len(scale.seeds) > 1)} {listed(scale.seeds)}. Every claim is compared with a bound that was set "
        "beforehand; where it does not hold, the report says so. "
        f"{_SEVERAL * (len(scale.seeds) > 1)}"
        "FID-LeNet is the Frechet distance in the feature space of a small classifier trained on these images: it "
        "compares the systems on this page, and nothing else."
    )
    return _PAGE.format(
        style=_STYLE,
        intro=escape(intro),
        overview=_overview(results),
        sections="\n".join(_section(result, folder) for result in results),
    )


def _overview(results: Iterable[StepResult]) -> str:
    rows = []
    for result in results:
        held = sum(claim.held for claim in result.claims)
        style = "held" if held == len(result.claims) else "broken"
        rows.append(
            f'<tr><td>{result.number}</td><td><a href="#step-{result.number}">{escape(result.title)}</a></td>'
            f'<td class="{style}">{held} of {len(result.claims)}</td>'
            f'<td class="figure">{result.seconds:.0f} s</td></tr>'
        )
    head = "<tr><th>step</th><th></th><th>claims that hold</th><th>time</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _section(result: StepResult, folder: Path) -> str:
    parts = [
        f'<section id="step-{result.number}">',
        f"<h2>{result.number}. {escape(result.title)}</h2>",
        f"<p>{escape(result.codes)}</p>",
        f'<p class="sizes">Made with: {escape(result.sizes)}.</p>',
        _claims(result.claims),
        *(_figure(folder / picture.file, picture.caption) for picture in result.pictures),
        *(_table(table) for table in result.tables),
        *(f"<p>{escape(remark)}</p>" for remark in result.remarks),
        "</section>",
    ]
    return "\n".join(parts)


def _claims(claims: Iterable[Claim]) -> str:
    rows = []
    for claim in claims:
        style, verdict = ("held", "holds") if claim.held else ("broken", "does not hold")
        reason = f" {claim.otherwise}" if claim.otherwise and not claim.held else ""
        if len(claim.figures) > 1 and not claim.held:
            reason = f" Seed by seed: {', '.join(in_words(figure) for figure in claim.figures)}.{reason}"
        relation = "at most" if claim.relation == "<=" else "at least"
        rows.append(
            f"<tr><td>{escape(claim.claim)}<br>"
            f'<span class="note">{escape(claim.measure)}.{escape(reason)}</span></td>'
            f'<td class="figure">{escape(in_words(claim.figures))}</td>'
            f'<td class="figure">{relation} {escape(in_words(claim.bound))}</td>'
            f'<td class="{style}">{verdict}</td></tr>'
        )
    head = "<tr><th>claim</th><th>figure</th><th>bound</th><th></th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption, quote=True)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        "<tr>" + "".join(f'<td class="figure">{escape(in_words(cell))}</td>' for cell in row) + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    caption = f"<caption>{escape(table.title)}</caption>"
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'

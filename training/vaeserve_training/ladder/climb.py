"""Run the ladder: plan, train what is missing, measure, and leave a report that is whole at any moment.

A finished step is a file under `steps/`, a finished network an entry of `cache/`; both are found again, so a ladder
that was killed goes on where it was. `results.json` and `report.html` are written anew after every step, from all steps
in the folder that were made with these sizes and images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.table import Table

from vaeserve_training import atomic
from vaeserve_training.compute import cpu_threads
from vaeserve_training.data import ImageData, summary
from vaeserve_training.ladder import lenet, page
from vaeserve_training.ladder.cache import CacheError
from vaeserve_training.ladder.lab import Lab
from vaeserve_training.ladder.planning import plan
from vaeserve_training.ladder.registry import STEPS, Step
from vaeserve_training.ladder.results import StepResult
from vaeserve_training.ladder.scale import Scale
from vaeserve_training.ladder.workshop import Workshop, default_workers, networks, training_steps
from vaeserve_training.progress import Bar

RESULTS = "results.json"
REPORT = "report.html"
_STEPS = "steps"
_FORMAT = 3  # of a step's file; raised when the same sizes would no longer give the same figures, or not all of them

logger = logging.getLogger(__name__)


def climb(
    scale: Scale,
    data: ImageData,
    out: Path,
    *,
    numbers: Sequence[int] = tuple(STEPS),
    device: str = "auto",
    workers: int | None = None,
    show_plan: Callable[[Table], None] | None = None,
    show_progress: bool = False,
) -> list[StepResult]:
    """Run the steps with these numbers, skipping finished ones; return the results of all steps in the folder.

    Writes `report.html`, `results.json` and the pictures to `out`. `workers` networks are trained at a time, each in a
    process of its own (unset: one for each core; 1: in this process); `show_plan` is given the plan before anything is
    trained. Raises LadderDataError if the images have no labels, DivergedError, CacheError, OtherProcessError,
    WorkerError, OSError.
    """
    lenet.labels_of(data)
    lab = Lab(scale.within(data), data, out, device)
    todo = unfinished(lab, numbers)
    workers = workers or default_workers(device)
    if show_plan is not None:
        show_plan(plan(lab, numbers, todo, workers))
    steps = sum(training_steps(lab, task) for task in networks(lab, todo).values())
    with (
        Bar("ladder", steps, show=show_progress) as bar,
        Workshop(lab, todo, workers, bar.advance) as workshop,
    ):
        lab.advance = bar.advance
        for step in todo:
            result = _run(lab, step, workshop, bar)
            atomic.write_file(_file(lab, step.number), _saved(lab, result))
            write_report(lab)
            held = f"{sum(claim.held for claim in result.claims)} of {len(result.claims)} claims hold"
            logger.info("step %d, %s: %s, %.0f s", step.number, step.title, held, result.seconds)
    return write_report(lab)


def unfinished(lab: Lab, numbers: Sequence[int]) -> list[Step]:
    """Return the steps with these numbers that are still to be run, in the ladder's order."""
    return [STEPS[number] for number in sorted(set(numbers)) if _load(lab, number) is None]


def write_report(lab: Lab) -> list[StepResult]:
    """Write `results.json` and `report.html` from the finished steps, and return these."""
    results = [result for number in STEPS if (result := _load(lab, number)) is not None]
    record = {
        "scale": lab.scale.model_dump(mode="json"),
        "data": summary(lab.data),
        "steps": [result.model_dump(mode="json") for result in results],
    }
    atomic.write_file(lab.out / RESULTS, json.dumps(record, indent=2).encode())
    atomic.write_file(lab.out / REPORT, page.render(results, lab.scale, lab.data, lab.out).encode())
    return results


def _run(lab: Lab, step: Step, workshop: Workshop, bar: Bar) -> StepResult:
    started_s = time.perf_counter()
    bar.note(f"training for step {step.number}")
    workshop.wait_for(step)
    bar.note(f"measuring step {step.number}")
    with cpu_threads(1 if workshop.busy else None):
        findings = step.measure(lab)
    return StepResult(
        **findings.model_dump(),
        number=step.number,
        title=step.title,
        codes=step.codes,
        seconds=time.perf_counter() - started_s,
    )


def _file(lab: Lab, number: int) -> Path:
    return lab.out / _STEPS / f"{number:02}.json"


def _key(lab: Lab) -> dict[str, Any]:
    """Return what a step's result depends on."""
    images = {"sha256": lab.data.sha256, "test_images": len(lab.data.test)}
    return {"format": _FORMAT, "scale": lab.scale.model_dump(mode="json"), "data": images}


def _saved(lab: Lab, result: StepResult) -> bytes:
    pictures = {picture.file: _digest(lab.out / picture.file) for picture in result.pictures}
    saved = {"key": _key(lab), "pictures": pictures, "result": result.model_dump(mode="json")}
    return json.dumps(saved, indent=2).encode()


def _digest(path: Path) -> str | None:
    """Return the file's SHA-256, None if it is not there."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _load(lab: Lab, number: int) -> StepResult | None:
    """Return the step's result if it was made with these sizes and images and its pictures are there as it drew them.

    Those of a run with other sizes in the same folder may have taken their place.
    """
    path = _file(lab, number)
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_bytes())
        if saved["key"] != _key(lab):
            return None
        result, pictures = StepResult.model_validate(saved["result"]), dict(saved["pictures"])
    except (ValueError, KeyError, ValidationError) as error:
        raise CacheError(f"{path} is no result of a step ({error}); remove it and run the step again") from error
    return result if all(_digest(lab.out / file) == digest for file, digest in pictures.items()) else None

"""What a card can tell of operating points beyond their calibration: quality on other rows, and measured time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..calibration.rare_classes import early_and_full_f1
from ..calibration.replay import replay
from ..errors import UsageError
from ..metrics import uneven_classes
from ..modeling.configuration import EXACT
from ..modeling.protocol import Wrapped
from ..serving.collect import collect_trace
from ..serving.graph_walker import walker_for
from ..serving.reader import reader_for, reads_images
from ..serving.scheduler import Scheduler
from ..serving.served import served_classifier
from ..timing import compare_speed
from ..values import check_whole
from .save import Calibrations, by_name


def card_figures(
    model: Wrapped,
    calibration: Calibrations,
    rows: Any,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    labels: Any = None,
    repeats: int = 5,
    progress: bool = True,
) -> dict[str, Any]:
    """Judge the operating points on labelled rows that chose nothing and, in turns with the full model, time them.

    Args:
        model: as for `save`.
        calibration: as for `save`.
        rows: labelled rows that neither trained nor chose anything.
        tokenizer: needed for texts.
        image_processor: needed for pictures.
        labels: one a row, where `rows` has no label column.
        repeats: rounds of timing after one to warm up; 0 for no timing.
        progress: show a bar.

    Returns:
        `evaluations`, `timings`, `timed_on`, and `f1s` where classes are uneven, for the argument `card` of `save` and
        `push_to_hub`.

    Raises:
        UsageError: without a calibration, or for a negative number of repeats.
        DataError: for rows without labels.

    Examples:
        >>> figures = ee.hub.card_figures(model, results, rows, tokenizer=tokenizer)  # doctest: +SKIP
        >>> card = {"license": "mit", **figures}  # doctest: +SKIP
        >>> ee.save(model, "folder", tokenizer=tokenizer, calibration=results, card=card)  # doctest: +SKIP
    """
    results = {} if calibration is None else by_name(calibration)
    if not results:
        raise UsageError("There is no calibration to judge; calibrate first.", field="calibration")
    check_whole(repeats=repeats)
    parts = {"tokenizer": tokenizer, "image_processor": image_processor}
    trace = collect_trace(model, rows, **parts, labels=labels, split="card", progress=progress)
    evaluations = {name: replay(result.policy, trace) for name, result in results.items()}
    judged: dict[str, Any] = {"evaluations": evaluations}
    if uneven_classes(trace.labels, trace.problem_type, trace.logits.shape[-1]):
        judged["f1s"] = {name: early_and_full_f1(result.policy, trace) for name, result in results.items()}
    if repeats == 0:
        return judged
    model = served_classifier(model)
    walker, encoded = walker_for(model), reader_for(model, tokenizer, None, image_processor).encode_all(rows)[:]
    runs = {EXACT: Scheduler(walker, None, walker.best_batch_tokens)}
    runs |= {name: Scheduler(walker, result.policy, walker.best_batch_tokens) for name, result in results.items()}
    timings = compare_speed({name: partial(run.run, encoded) for name, run in runs.items()}, EXACT, repeats)
    del timings[EXACT]
    kind = "images" if reads_images(model) else "texts"
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    return judged | {
        "timings": timings,
        "timed_on": f"{len(encoded)} {kind}, {model.device.type}{threads}, {str(model.dtype).removeprefix('torch.')}",
    }

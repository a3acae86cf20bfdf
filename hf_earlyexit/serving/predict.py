"""Answers for many rows, in the order they came: all at once, or as a stream."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import EarlyExitError
from ..modeling.protocol import ExitClassifier, ExitModel, Wrapped
from ..problem_types import same_prediction
from ..values import check_flags, check_whole, is_real, unexpected
from .answers import Answer, Answers
from .graph_walker import walker_for
from .monitor import Monitor, check_monitor, require_classes
from .read_ahead import Encode, windows_read
from .reader import PICTURES, first_error, reader_for
from .scheduler import Scheduler
from .served import form_of, served_classifier
from .shadow import Shadow

WINDOW, WINDOW_WITH_DEADLINE = 4096, 256  # rows; tokenizing a window must not take longer than a layer
PICTURES_WITH_DEADLINE = 8  # one takes as long as many texts


class Predictions(NamedTuple):
    """Answers of N rows.

    Attributes:
        logits: `[N, C]`; nan for a row without an answer.
        exit_layer: the layer each row left after `[N]`, 1 to L; 0 for a row without an answer.
        exit_score: its score there `[N]`; nan without a policy or an answer.
        reason: for each row "policy", "last layer", "layer budget", "deadline" or "error".
        errors: what was wrong with a row, by its place; only with `errors="slot"`.
        form: of the model that answered, such as "fp32" or "int8": see `convert`.
    """

    logits: Tensor
    exit_layer: Tensor
    exit_score: Tensor
    reason: list[str]
    errors: dict[int, EarlyExitError]
    form: str = "fp32"


def predict(
    model: Wrapped,
    rows: Any,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    max_batch_tokens: int | None = None,
    max_length: int | None = None,
    early_exit: bool | None = None,
    operating_point: str | None = None,
    layer_budget: int | None = None,
    deadline: float | None = None,
    errors: str = "raise",
    cuda_graphs: bool = True,
    monitor: Monitor | None = None,
    progress: bool = False,
) -> Predictions:
    """Classify many rows; batches hold rows of similar length and are filled up again as rows leave them.

    Args:
        model: a model with exits; also within torch.compile, DataParallel or PEFT. Nothing is written on it, so threads may
            share it; in training mode it answers as `model.eval()` would.
        rows: texts, text pairs, or a data set with texts or token ids; or any iterator of these. A DataFrame, columns by
            name and what a tokenizer returned for several texts are rows, too. For image classifiers: files, PIL images,
            arrays of bytes, or a data set with a column `image`, decoded or not, or `pixel_values`.
        tokenizer: needed for texts.
        image_processor: needed for pictures; it sees one at a time.
        max_batch_tokens: padded tokens, or patches, in a batch; by default what suits the device (512 on a CPU, 16,384
            elsewhere).
        max_length: cut longer texts; the tokenizer's own limit by default.
        early_exit, operating_point: as in `forward`.
        layer_budget: most layers a row may run; it then leaves at the last exit within.
        deadline: seconds for the whole call, kept to one layer of one batch (of two on CUDA). Rows that are under way then
            leave at the last exit they passed; those that passed none have no answer.
        errors: "raise", or "slot" to go on with the other rows and keep the error in the row's place.
        cuda_graphs: on a CUDA device, run what comes again as CUDA graphs; without effect elsewhere.
        monitor: sees every answer; a share of the rows runs on to the last layer, to tell whether the full model answers
            the same. No answer changes. Rows of a window that the deadline cuts off are not compared.
        progress: show a bar.

    Returns:
        Answers in the order of the rows; of length 0 for no rows.

    Raises:
        DataError: for a row that cannot be read, or whose answer is not finite, with `errors="raise"`.
        UsageError: for arguments out of range, and for what is no model with exits or holds no rows.
    """
    model = served_classifier(model)
    check_flags(progress=progress)
    if deadline is not None and not (is_real(deadline, 0) or (isinstance(deadline, float) and deadline == math.inf)):
        raise unexpected("deadline", deadline, "seconds, at least 0")
    ends_at = None if deadline is None else time.monotonic() + deadline
    reader = reader_for(model, tokenizer, max_length, image_processor)
    with_clock = deadline is not None
    if reader.images:
        size = PICTURES_WITH_DEADLINE if with_clock else PICTURES
    else:
        size = WINDOW_WITH_DEADLINE if with_clock else WINDOW
    options = _Options(
        early_exit=early_exit,
        operating_point=operating_point,
        max_batch_tokens=max_batch_tokens,
        layer_budget=layer_budget,
        ends_at=ends_at,
        errors=errors,
        cuda_graphs=cuda_graphs,
        monitor=monitor,
        counted=True,
    )
    count = len(rows) if hasattr(rows, "__len__") else None
    with tqdm(total=count, disable=not progress, unit="row") as bar:
        done = list(_answered(model, reader.windows(rows, size), reader.encode, options, bar.update))
    done = done or [Answers.blank(0, model.num_labels)]
    starts = [0]
    for part in done:
        starts.append(starts[-1] + len(part.reason))
    return Predictions(
        torch.cat([part.logits for part in done]),
        _layers(model, torch.cat([part.exit_index for part in done])),
        torch.cat([part.score for part in done]),
        [reason for part in done for reason in part.reason],
        {start + place: error for start, part in zip(starts, done, strict=False) for place, error in part.errors.items()},
        form_of(model),
    )


def stream(
    model: Wrapped,
    rows: Any,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    window: int | None = None,
    max_batch_tokens: int | None = None,
    max_length: int | None = None,
    early_exit: bool | None = None,
    operating_point: str | None = None,
    layer_budget: int | None = None,
    errors: str = "raise",
    cuda_graphs: bool = True,
    monitor: Monitor | None = None,
) -> Iterator[Answer]:
    """Classify an endless supply of rows in constant memory; answers come in the order of the rows.

    Args:
        model, rows, tokenizer, image_processor, max_batch_tokens, max_length, early_exit, operating_point, layer_budget,
            errors, cuda_graphs, monitor: as in `predict`.
        window: rows that are read before the first of them is answered, at least 1. Few answer soon, many run faster; by
            default 4,096 texts or 256 pictures.

    Yields:
        An answer for each row.
    """
    model = served_classifier(model)
    reader = reader_for(model, tokenizer, max_length, image_processor)
    if window is None:
        window = PICTURES if reader.images else WINDOW
    check_whole(1, window=window)
    options = _Options(
        early_exit=early_exit,
        operating_point=operating_point,
        max_batch_tokens=max_batch_tokens,
        layer_budget=layer_budget,
        errors=errors,
        cuda_graphs=cuda_graphs,
        monitor=monitor,
        counted=hasattr(rows, "__len__"),
    )
    return _one_by_one(model, _answered(model, reader.windows(rows, window), reader.encode, options))


def stream_windows(
    model: ExitClassifier,
    windows: Iterable[Sequence[Any]],
    encode: Encode,
    *,
    counted: bool,
    early_exit: bool | None = None,
    operating_point: str | None = None,
    cuda_graphs: bool = True,
    monitor: Monitor | None = None,
) -> Iterator[Answer]:
    """Classify windows of rows that somebody else knows how to read; as `stream` does beyond that.

    Args:
        model, early_exit, operating_point, cuda_graphs, monitor: as in `stream`.
        windows: rows that are read before the first of them is answered.
        encode: gives what the model reads of the rows of a window, whose first row has this number.
        counted: nobody waits for an answer before the next row is given, so a window may be read while another is answered.

    Yields:
        An answer for each row.
    """
    options = _Options(
        early_exit=early_exit,
        operating_point=operating_point,
        max_batch_tokens=None,
        layer_budget=None,
        errors="raise",
        cuda_graphs=cuda_graphs,
        monitor=monitor,
        counted=counted,
    )
    return _one_by_one(model, _answered(model, windows, encode, options))


def _one_by_one(model: ExitModel, parts: Iterator[Answers]) -> Iterator[Answer]:
    for part in parts:
        columns = (_layers(model, part.exit_index).tolist(), part.score.tolist(), part.reason)
        for place, (logits, layer, score, reason) in enumerate(zip(part.logits, *columns, strict=True)):
            yield Answer(logits, layer, score, reason, part.errors.get(place))


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What `predict` and `stream` were asked for, checked; `ends_at` is the deadline on the monotonic clock, in seconds.

    `counted` tells that nobody waits for an answer before the next row is given.
    """

    early_exit: bool | None
    operating_point: str | None
    max_batch_tokens: int | None
    layer_budget: int | None
    ends_at: float | None = None
    errors: str
    cuda_graphs: bool
    monitor: Monitor | None
    counted: bool

    def __post_init__(self) -> None:
        if not isinstance(self.errors, str) or self.errors not in ("raise", "slot"):
            raise unexpected("errors", self.errors, "'raise' or 'slot'")
        check_monitor(self.monitor)
        check_flags(cuda_graphs=self.cuda_graphs)

    @property
    def raises(self) -> bool:
        """Whether the first row at fault ends the call."""
        return self.errors == "raise"


def _answered(
    model: ExitClassifier,
    windows: Iterable[Sequence[Any]],
    encode: Encode,
    options: _Options,
    on_done: Callable[[int], Any] = lambda rows: None,
) -> Iterator[Answers]:
    """Answers window by window; `on_done` hears how many rows have been answered."""
    walker, monitor, ends_at = walker_for(model, options.cuda_graphs), options.monitor, options.ends_at
    budget = walker.best_batch_tokens if options.max_batch_tokens is None else options.max_batch_tokens
    for first, window, read in windows_read(windows, encode, ahead=walker.reads_ahead and options.counted):
        if ends_at is not None and time.monotonic() >= ends_at:
            on_done(len(window))
            answers = Answers.blank(len(window), walker.num_classes)
        else:
            falls_back = monitor is not None and monitor.falls_back
            policy = None if falls_back else model.choose_policy(options.early_exit, options.operating_point, {})
            scheduler = Scheduler(walker, policy, budget, options.layer_budget, ends_at, on_done)
            encoded = read()
            if options.raises:
                first_error(encoded, walker.check, first)
            same: list[bool] = []
            shadow = None
            if monitor is not None and policy is not None:
                require_classes(policy.problem_type)
                chosen = frozenset(monitor.draw(len(encoded)))
                shadow = Shadow(scheduler, chosen.__contains__, same.extend)
            answers = scheduler.run(encoded, first, shadow, checked=options.raises)
            if options.raises and answers.errors:
                raise answers.errors[min(answers.errors)]
            if monitor is not None and shadow is not None:
                layers = _layers(model, answers.exit_index[answers.exit_index >= 0]).tolist()
                monitor.record(layers, () if scheduler.late() else same)  # the time chooses whom it cuts off
        yield answers


def monitored(
    monitor: Monitor, model: ExitClassifier, inputs: Mapping[str, Any], early_exit: bool | None, operating_point: str | None
) -> Any:
    """The output of one batch of `forward`, shown to a monitor as `predict` does.

    Args:
        monitor: sees where rows left, and of a share of them whether the full model answers the same.
        model: a model with exits.
        inputs: tensors of the batch, rows first.
        early_exit, operating_point: as in `forward`.
    """
    if monitor.falls_back:
        return model(**inputs, early_exit=False)
    policy = model.choose_policy(early_exit, operating_point, {})
    if policy is None:
        return model(**inputs, early_exit=early_exit, operating_point=operating_point)
    require_classes(policy.problem_type)
    shadowed = monitor.draw(len(next(iter(inputs.values()))))
    output = model(**inputs, early_exit=early_exit, operating_point=operating_point, shadowed=shadowed)
    same = same_prediction(output.logits[shadowed], output.full_logits, policy.problem_type).tolist() if shadowed else ()
    monitor.record(output.exit_layer.tolist(), same)
    return output


def _layers(model: ExitModel, exit_index: Tensor) -> Tensor:
    """Layers (1-based) of exit indices, 0 for -1."""
    return torch.tensor((*model.exit_layers, 0))[exit_index]

"""From requests to rows of an engine, and from its answers to what responses hold."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EarlyExitError
from ..problem_types import MULTI_LABEL, SINGLE_LABEL
from ..serving.online import Engine
from ..serving.online_rows import ENGINE
from ..serving.predict import Answer
from ..serving.reader import reads_images
from .shapes import Classified, Scored

LONGEST_MESSAGE = 300


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a request may ask for: rows, bytes, characters of a row, and seconds."""

    max_rows: int = 32
    max_body: int = 2_000_000
    max_characters: int = 100_000
    max_seconds: float = 30.0


class RefusedError(Exception):
    """A request that gets no answer, as a status, a kind and words."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        shown = message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 3]}..."
        self.status, self.kind, self.message = status, kind, shown.encode(errors="backslashreplace").decode()


async def answers_of(engine: Engine, rows: Sequence[Any], limits: Limits, **choice: Any) -> list[Answer]:
    """Answers of all rows of a request, or none.

    Raises:
        RefusedError: 413 for too many rows or characters, 422 for a row that cannot be read or a choice that cannot be, 429
            if the queue is full, 503 if it takes too long or the engine ends.
    """
    if len(rows) > limits.max_rows:
        raise RefusedError(413, "validation", f"The request has {len(rows)} rows; at most {limits.max_rows} are taken.")
    for row in rows:
        size = len(row) if isinstance(row, str) else sum(map(len, row)) if isinstance(row, tuple) else 0
        if size > limits.max_characters:
            raise RefusedError(413, "validation", f"A row has {size} characters; at most {limits.max_characters} are taken.")
    futures: list[Any] = []
    try:
        for row in rows:
            futures.append(engine.submit(row, **choice))
        return await asyncio.wait_for(
            asyncio.gather(*(asyncio.wrap_future(future) for future in futures)), limits.max_seconds
        )
    except TimeoutError:
        raise RefusedError(503, "overloaded", f"There was no answer within {limits.max_seconds:g} seconds.") from None
    except EarlyExitError as error:
        if error.field == "max_queue":
            raise RefusedError(429, "overloaded", str(error)) from None
        ended = engine.closed or error.field == ENGINE
        raise RefusedError(503 if ended else 422, "backend" if ended else "validation", str(error)) from None
    finally:
        for future in futures:
            future.cancel()


def text_row(texts: str | list[str]) -> str | tuple[str, ...]:
    """A text, or a pair of two; a list of one is that text."""
    if isinstance(texts, str):
        return texts
    return texts[0] if len(texts) == 1 else tuple(texts)


def picture_row(encoded: str) -> dict[str, bytes]:
    """A picture file from its base64 form, which may be a data URL.

    Raises:
        RefusedError: for what is no base64.
    """
    _, comma, data = encoded.partition(",")
    try:
        return {"bytes": base64.b64decode(data if comma else encoded, validate=True)}
    except (binascii.Error, ValueError) as error:
        raise RefusedError(422, "validation", f"A picture is no base64 ({error}).") from None


def needs(model: Any, pictures: bool) -> None:
    """Refuse texts where a model reads pictures, and the other way round."""
    if reads_images(model) != pictures:
        kind = "pictures: send images, files in base64, to /v1/classify" if reads_images(model) else "texts: send inputs"
        raise RefusedError(422, "validation", f"This model reads {kind}.")


def scored(model: Any, answer: Answer, raw: bool) -> list[Scored]:
    """Every label with its score, the highest first."""
    values = answer.logits if raw else probabilities(model, answer)
    names = model.config.id2label
    pairs = [Scored(score=score, label=str(names[index])) for index, score in enumerate(values.tolist())]
    return sorted(pairs, key=lambda pair: -pair.score)


def probabilities(model: Any, answer: Answer) -> Any:
    """Scores from 0 to 1 `[C]`; values of one logit, as rerankers have, through the logistic function."""
    single = model.config.resolved_problem_type == SINGLE_LABEL and len(answer.logits) > 1
    return answer.logits.softmax(-1) if single else answer.logits.sigmoid()


def classified(model: Any, answer: Answer) -> Classified:
    """An answer with the layer it left after."""
    layers = model.exit_layers[-1]
    if answer.exit_layer == 0:
        nothing = "The deadline passed before the row came to its first exit."
        return Classified(
            label=None, score=None, logits=None, exit_layer=None, num_layers=layers, exit_score=None,
            reason=answer.reason, error=nothing,
        )  # fmt: skip
    kind = model.config.resolved_problem_type
    label = score = None
    if kind in (SINGLE_LABEL, MULTI_LABEL):
        best = scored(model, answer, raw=False)[0]
        label, score = best.label, best.score
    exit_score = answer.exit_score if answer.exit_score == answer.exit_score else None
    return Classified(
        label=label, score=score, logits=answer.logits.tolist(), exit_layer=answer.exit_layer, num_layers=layers,
        exit_score=exit_score, reason=answer.reason,
    )  # fmt: skip

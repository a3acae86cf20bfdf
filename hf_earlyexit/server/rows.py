"""From requests to rows of an engine, and from its answers to what responses hold."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import EarlyExitError
from ..modeling.protocol import ExitClassifier
from ..problem_types import MULTI_LABEL, SINGLE_LABEL
from ..serving.answers import Answer
from ..serving.explain import explain
from ..serving.online import Engine
from ..serving.online_rows import ENGINE
from ..serving.reader import reads_images
from ..serving.served import form_of
from .shapes import Classified, ExitSaid, Scored

LONGEST_MESSAGE = 300
LONGEST_SHAPE = 100  # sides of a picture: an image processor that makes the shorter one 256 pixels makes the other as long
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a request may ask for: rows, bytes, seconds; and of a row: characters, tokens (`None`: as the tokenizer says)
    and pixels."""

    max_rows: int = 32
    max_body: int = 2_000_000
    max_characters: int = 100_000
    max_tokens: int | None = None
    max_pixels: int = 25_000_000
    max_seconds: float = 30.0


class RefusedError(Exception):
    """A request that gets no answer, as a status, a kind and words."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        shown = message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 3]}..."
        self.status, self.kind, self.message = status, kind, shown.encode(errors="backslashreplace").decode()


def check_rows(rows: Sequence[Any], limits: Limits) -> None:
    """Refuse too much, before anything is done with it.

    Raises:
        RefusedError: 413 for too many rows, characters or pixels.
    """
    if len(rows) > limits.max_rows:
        raise RefusedError(413, "validation", f"The request has {len(rows)} rows; at most {limits.max_rows} are taken.")
    for row in rows:
        if isinstance(row, dict):
            _check_picture(row["bytes"], limits.max_pixels)
            continue
        size = len(row) if isinstance(row, str) else sum(map(len, row))
        if size > limits.max_characters:
            raise RefusedError(413, "validation", f"A row has {size} characters; at most {limits.max_characters} are taken.")


def _check_picture(file: bytes, most: int) -> None:
    """Refuse a picture that is much bigger than its file; only the beginning is read."""
    from PIL import Image

    words = f"at most {most} in all, and {LONGEST_SHAPE} times as long as wide, are taken."
    try:
        with Image.open(io.BytesIO(file)) as picture:
            width, height = picture.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RefusedError(413, "validation", f"A picture has far too many pixels; {words}") from None
    except Exception:  # it has many kinds of them; whoever reads all of the file tells what is wrong
        return
    if width * height > most or max(width, height) > LONGEST_SHAPE * min(width, height):
        raise RefusedError(413, "validation", f"A picture is {width} x {height} pixels; {words}")


# seconds before a full queue is answered: clients that ask again at once would leave the engine's thread no time
PAUSE = 0.1


async def answers_of(engine: Engine, rows: Sequence[Any], limits: Limits, **choice: Any) -> list[Answer]:
    """Answers of all rows of a request, or none.

    Raises:
        RefusedError: 422 for a row that cannot be read or a choice that cannot be, 429 if the queue is full, 503 if it takes
            too long, or the engine ends or is that of another process.
    """
    futures: list[Any] = []
    try:
        for row in rows:
            futures.append(engine.submit(row, **choice))
        async with asyncio.timeout(limits.max_seconds):
            answers: list[Answer] = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
            return answers
    except TimeoutError:
        raise RefusedError(503, "overloaded", f"There was no answer within {limits.max_seconds:g} seconds.") from None
    except EarlyExitError as error:
        if error.field == "max_queue":
            await asyncio.sleep(PAUSE)
            raise RefusedError(429, "overloaded", str(error)) from None
        ended = error.field == ENGINE
        raise RefusedError(503 if ended else 422, "backend" if ended else "validation", str(error)) from None
    finally:
        for future in futures:
            future.cancel()


class Turns:
    """Work of one request at a time, in another thread, while the server goes on with others."""

    def __init__(self) -> None:
        self.one_at_a_time = asyncio.Lock()

    async def take(self, limits: Limits, work: Callable[[], Result]) -> Result:
        """Do the work when its turn comes.

        Args:
            limits: of the seconds that a request may wait for its turn.
            work: to do.

        Raises:
            RefusedError: 503 if its turn does not come, 422 for what the work finds wrong.
        """
        try:
            await asyncio.wait_for(self.one_at_a_time.acquire(), limits.max_seconds)
        except TimeoutError:
            words = f"Others asked for the like first; there was no turn within {limits.max_seconds:g} seconds."
            raise RefusedError(503, "overloaded", words) from None
        try:
            return await asyncio.to_thread(work)
        except EarlyExitError as error:
            raise RefusedError(422, "validation", str(error)) from None
        finally:
            self.one_at_a_time.release()


def said_of(model: ExitClassifier, rows: Sequence[Any], **choice: Any) -> list[list[ExitSaid] | None]:
    """What every exit says of each row; `None` where no exit is asked.

    Args:
        model: with exits.
        rows: that have been answered.
        choice: of `explain`: what reads the rows, operating_point, max_length.
    """
    return [_views(model, row, choice) for row in rows]


def _views(model: ExitClassifier, row: Any, choice: dict[str, Any]) -> list[ExitSaid] | None:
    if model.policy_at(choice["operating_point"]) is None:
        return None
    explanation = explain(model, row, **choice)
    return [
        ExitSaid(layer=view.layer, prediction=view.prediction, score=_finite(view.score), threshold=view.threshold,
                 verdict=view.verdict)
        for view in explanation.exits
    ]  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


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


def needs(model: ExitClassifier, pictures: bool) -> None:
    """Refuse texts where a model reads pictures, and the other way round."""
    if reads_images(model) != pictures:
        kind = "pictures: send images, files in base64, to /v1/classify" if reads_images(model) else "texts: send inputs"
        raise RefusedError(422, "validation", f"This model reads {kind}.")


def label_scores(model: ExitClassifier, answer: Answer, raw: bool) -> list[Scored]:
    """Every label with its score, the highest first."""
    values = answer.logits if raw else probabilities(model, answer)
    names = model.config.id2label
    pairs = [Scored(score=score, label=str(names[index])) for index, score in enumerate(values.tolist())]
    return sorted(pairs, key=lambda pair: -pair.score)


def probabilities(model: ExitClassifier, answer: Answer) -> Any:
    """Scores from 0 to 1 `[C]`; values of one logit, as rerankers have, through the logistic function."""
    single = model.config.resolved_problem_type == SINGLE_LABEL and len(answer.logits) > 1
    return answer.logits.softmax(-1) if single else answer.logits.sigmoid()


def classified(model: ExitClassifier, answer: Answer) -> Classified:
    """An answer with the layer it left after, and the form it was made by."""
    layers = model.exit_layers[-1]
    if answer.exit_layer == 0:
        nothing = "The deadline passed before the row came to its first exit."
        return Classified(
            label=None, score=None, logits=None, exit_layer=None, num_layers=layers, exit_score=None,
            reason=answer.reason, form=form_of(model), error=nothing,
        )  # fmt: skip
    kind = model.config.resolved_problem_type
    label = score = None
    if kind in (SINGLE_LABEL, MULTI_LABEL):
        best = label_scores(model, answer, raw=False)[0]
        label, score = best.label, best.score
    return Classified(
        label=label, score=score, logits=answer.logits.tolist(), exit_layer=answer.exit_layer, num_layers=layers,
        exit_score=_finite(answer.exit_score), reason=answer.reason, form=form_of(model),
    )  # fmt: skip

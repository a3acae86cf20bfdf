"""The routes: an engine behind FastAPI. Nothing a request holds is logged, and none can name a file, a folder or a model."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from copy import deepcopy
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ..errors import UsageError
from ..serving.monitor import Monitor
from ..serving.online import Engine
from .guard import Guard, problem
from .metrics import Metrics
from .reference import reference_page
from .rows import (
    Limits,
    RefusedError,
    Turns,
    answers_of,
    check_rows,
    classified,
    label_scores,
    needs,
    picture_row,
    probabilities,
    said_of,
    text_row,
)
from .shapes import Classified, ClassifyRequest, PredictRequest, Problem, Ranked, RerankRequest, Scored

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": words}
    for status, words in (
        (400, "No JSON"),
        (401, "No key, or another"),
        (408, "The body did not come in time"),
        (411, "No length of the body, or chunks"),
        (413, "Too much"),
        (415, "Another content type than JSON's"),
        (422, "What cannot be read"),
        (429, "The queue is full"),
        (503, "No answer in time"),
    )
}
PAGE_SAFETY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


def make_app(
    engine: Engine,
    *,
    parts: dict[str, Any] | None = None,
    limits: Limits | None = None,
    operating_point: str | None = None,
    api_key: str | None = None,
    monitor: Monitor | None = None,
    on_stop: Callable[[], Any] = lambda: None,
) -> FastAPI:
    """The application that answers for an engine of one model.

    Args:
        engine: whose model is looked up at each request, so that it may be replaced.
        parts: the engine's tokenizer or image_processor, by that name, which tell whether a text would be cut, and what
            every exit says of a row; `replace_parts` replaces them.
        limits: of a request.
        operating_point: of requests that name none.
        api_key: that every request but for the page and the probes must bring as `Authorization: Bearer ...`: visible ASCII.
        monitor: the engine's, for `/metrics`.
        on_stop: called when the server has stopped and every request is answered.

    Raises:
        UsageError: for a key that no header can hold.
    """
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise UsageError(
            "The API key is empty, or holds a space, the end of a line or another character that clients cannot send in a "
            "header; expected letters, digits and signs of ASCII.",
            field="api_key",
        )
    limits, metrics, counting, explaining = limits or Limits(), Metrics(engine, monitor), Turns(), Turns()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(on_stop)

    app = FastAPI(
        title="hf_earlyexit",
        description="Classifiers whose rows leave early.",
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    replace_parts(app, parts or {})
    paths: set[str] = set()
    app.add_middleware(Guard, api_key=api_key, limits=limits, metrics=metrics, paths=paths)

    def model_of() -> Any:
        return next(iter(engine.models.values()))

    def point_of(named: str | None) -> str | None:
        return operating_point if named is None else named

    async def check(rows: list[Any], truncate: bool | None = None) -> None:
        check_rows(rows, limits)
        if truncate is False and app.state.tokenizer is not None:
            await counting.take(limits, partial(_check_lengths, app.state.tokenizer, limits, rows))

    async def answered(rows: list[Any], point: str | None = None, **choice: Any) -> list[Any]:
        choice["operating_point"] = point_of(point)
        answers = await answers_of(engine, rows, limits, **choice)
        for answer in answers:
            metrics.exits.labels(answer.exit_layer).inc()
        return answers

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return problem(error.status, error.message, error.kind)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part)[:40] for part in first["loc"][:6])
        return problem(422, f"{place}: {first['msg']}"[:300].encode(errors="backslashreplace").decode())

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    @app.post("/predict", response_model=list[Scored] | list[list[Scored]], responses=PROBLEMS)
    async def predict(body: PredictRequest) -> Any:
        """Every label with its score, as text-embeddings-inference gives it."""
        model = model_of()
        needs(model, pictures=False)
        several = isinstance(body.inputs, list) and isinstance(body.inputs[0], list)
        rows = [text_row(row) for row in (body.inputs if several else [body.inputs])]  # type: ignore[arg-type]
        await check(rows, body.truncate)
        lists = [label_scores(model, answer, body.raw_scores) for answer in await answered(rows)]
        return lists if several else lists[0]

    @app.post("/rerank", response_model=list[Ranked], response_model_exclude_none=True, responses=PROBLEMS)
    async def rerank(body: RerankRequest) -> Any:
        """The texts in the order of their scores, as text-embeddings-inference gives it."""
        model = model_of()
        needs(model, pictures=False)
        if len(model.config.id2label) != 1:
            raise RefusedError(422, "validation", "This model gives several labels, so it is no reranker; use /predict.")
        rows = [(body.query, text) for text in body.texts]
        await check(rows, body.truncate)
        answers = await answered(rows)
        values = [float(answer.logits[0] if body.raw_scores else probabilities(model, answer)[0]) for answer in answers]
        texts = body.texts if body.return_text else [None] * len(values)
        ranked = [Ranked(index=index, score=value, text=texts[index]) for index, value in enumerate(values)]
        return sorted(ranked, key=lambda one: -one.score)

    @app.post("/v1/classify", response_model=list[Classified], responses=PROBLEMS)
    async def classify(body: ClassifyRequest) -> Any:
        """One label for each row, with the layer it left after, its score there, and why it left."""
        model = model_of()
        if (body.inputs is None) == (body.images is None):
            raise RefusedError(422, "validation", "Send either inputs or images.")
        needs(model, pictures=body.images is not None)
        rows: list[Any] = [text_row(row) for row in body.inputs or ()] or [picture_row(one) for one in body.images or ()]
        await check(rows)
        choice: dict[str, Any] = {
            "point": body.operating_point,
            "layer_budget": body.layer_budget,
            "deadline": body.deadline,
        }
        answers = [classified(model, answer) for answer in await answered(rows, **choice)]
        if body.exits:
            choice = {"operating_point": point_of(body.operating_point), "max_length": limits.max_tokens, **app.state.parts}
            views = await explaining.take(limits, partial(said_of, model, rows, **choice))
            answers = [answer.model_copy(update={"exits": one}) for answer, one in zip(answers, views, strict=True)]
        return answers

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": Problem}})
    async def ready() -> Any:
        """Whether it takes rows."""
        if engine.closed:
            return problem(503, "The server takes no rows: it stops, or its engine is another process's.")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def tell_metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def reference() -> Response:
        return HTMLResponse(reference_page(app.openapi()), headers={"Content-Security-Policy": PAGE_SAFETY})

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_SAFETY})

    paths.update(route.path for route in app.routes if hasattr(route, "path"))
    return app


def replace_parts(app: FastAPI, parts: dict[str, Any]) -> None:
    """Have an application read with other parts; it copies them, as each copy serves one thread at a time.

    Args:
        app: made by `make_app`.
        parts: as for `make_app`.
    """
    app.state.parts, app.state.tokenizer = deepcopy(parts), deepcopy(parts.get("tokenizer"))


def _check_lengths(tokenizer: Any, limits: Limits, rows: list[Any]) -> None:
    """Refuse rows that would be cut."""
    most = min(tokenizer.model_max_length, limits.max_tokens or tokenizer.model_max_length)
    for place, row in enumerate(rows):
        texts = (row,) if isinstance(row, str) else row
        try:
            length = len(tokenizer(*texts, truncation=False, verbose=False)["input_ids"])
        except Exception as error:  # tokenizers raise many kinds
            raise RefusedError(422, "tokenizer", f"Row {place} cannot be tokenized ({error}).") from None
        if length > most:
            raise RefusedError(422, "tokenizer", f"Row {place} has {length} tokens; at most {most} are taken.")

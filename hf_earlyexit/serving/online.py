"""Answers for rows that come one at a time, from anywhere: they meet in the layers and leave as they are decided."""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import Mapping
from copy import deepcopy
from types import NoneType
from typing import Any, Self

from ..errors import UsageError
from ..modeling.protocol import Wrapped
from ..policies.base import ExitPolicy
from ..registry import unknown_name
from ..values import check_flags, check_whole, is_real, unexpected
from .graph_walker import walker_for
from .monitor import Monitor, check_monitor, require_classes
from .online_rows import RowFuture
from .online_worker import EngineState, Worker
from .reader import reader_for
from .scheduler import Scheduler
from .served import served_classifier

DEFAULT_MODEL = "default"


class Engine:
    """Classifies rows that are submitted one at a time, by any number of threads and coroutines.

    One thread runs the layers. Rows that are there together run together, and who is decided leaves at once. With `max_wait`
    0 those under way go on before others begin; with more, rows join at layer 0 while others are deeper, and those who meet
    at a depth go on together. A row is never held back while there is nothing else to run. Answers are those of `predict`.

    Args:
        model: a model with exits, as for `predict`; or several by name.
        tokenizer: for texts; where there are several models, one for all, or by name. The engine works with a copy.
        image_processor: for pictures; likewise.
        max_batch_tokens: as for `predict`.
        max_length: cut longer texts.
        max_wait: seconds, at least 0, that rows wait for company at a depth while others run. By default 0 on a processor,
            which gains little by running many at once, and 0.005 on an accelerator.
        max_queue: most rows that wait to be let in, at least 1; further ones are refused.
        cuda_graphs: as for `predict`.
        monitor: of one model; sees every answer, and whether the full model answers the same to a share of the rows, which
            run on to the last layer when there is room.

    Raises:
        UsageError: for arguments out of range, and for what is no model with exits.

    Examples:
        >>> import torch, hf_earlyexit as ee
        >>> shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = ee.EarlyExitBertForSequenceClassification(ee.EarlyExitBertConfig(vocab_size=9, **shape))
        >>> with ee.Engine(model) as engine:
        ...     futures = [engine.submit({"input_ids": [1, 2, 3]}) for _ in range(4)]
        ...     [future.result().exit_layer for future in futures]
        [2, 2, 2, 2]
    """

    def __init__(
        self,
        model: Wrapped | Mapping[str, Wrapped],
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        max_batch_tokens: int | None = None,
        max_length: int | None = None,
        max_wait: float | None = None,
        max_queue: int = 1024,
        cuda_graphs: bool = True,
        monitor: Monitor | None = None,
    ) -> None:
        if max_wait is not None and not is_real(max_wait, 0):
            raise unexpected("max_wait", max_wait, "seconds, at least 0, or None")
        check_whole(1, max_queue=max_queue)
        check_flags(cuda_graphs=cuda_graphs)
        check_monitor(monitor)
        models = dict(model) if isinstance(model, Mapping) else {DEFAULT_MODEL: model}
        if not models:
            raise UsageError("model holds no models; expected at least one.", field="model")
        if monitor is not None and len(models) > 1:
            raise UsageError("A monitor watches one model; make an engine for it.", field="monitor")
        self._options: dict[str, Any] = {
            "max_batch_tokens": max_batch_tokens,
            "max_length": max_length,
            "cuda_graphs": cuda_graphs,
        }
        self._worker = Worker(max_queue, max_wait)
        self._served: dict[str, _Served] = {}
        for name, one in models.items():
            parts = {"tokenizer": _of(tokenizer, name), "image_processor": _of(image_processor, name)}
            self._served[name] = _Served(one, self._worker, monitor, **parts, **self._options)
        weakref.finalize(self, self._worker.close, False)

    def submit(
        self,
        row: Any,
        *,
        model: str | None = None,
        early_exit: bool | None = None,
        operating_point: str | None = None,
        deadline: float | None = None,
        layer_budget: int | None = None,
        priority: float = 0,
    ) -> RowFuture:
        """Hand in a row, and go on; it is read and run by the engine's thread.

        Args:
            row: a text, a pair of texts, token ids by column name or, for image classifiers, a picture.
            model: its name, where there are several.
            early_exit, operating_point: as in `forward`.
            deadline: seconds from now; then the row leaves at the last exit it passed, or with exit layer 0 and nan if it
                passed none. It is kept to one layer of one batch of every operating point in use, and `max_wait`.
            layer_budget: most layers the row may run; it then leaves at the last exit within.
            priority: bigger is let in first, among the rows of the same model, operating point and layer budget that have
                a deadline, or have none.

        Returns:
            A `concurrent.futures.Future` of an `Answer`, which can be awaited, too. Its errors: DataError for a row that
            cannot be read or whose answer is not finite, EarlyExitError with the field "engine" if its layers failed or the
            engine was closed. Callbacks run in the engine's thread: keep them short.

        Raises:
            UsageError, UnknownNameError: for arguments out of range, an unknown model or operating point.
            UsageError: with the field "engine" if the engine is closed, or was used before this process was forked; with the
                field "max_queue" if the queue is full: try again later.
        """
        if deadline is not None and not is_real(deadline, 0):
            raise unexpected("deadline", deadline, "seconds, at least 0")
        if not is_real(priority):
            raise unexpected("priority", priority, "a number")
        check_flags(early_exit=early_exit)
        if layer_budget is not None:
            check_whole(1, layer_budget=layer_budget)
        ends_at = math.inf if deadline is None else time.monotonic() + deadline
        future = RowFuture(row, priority, ends_at)
        self._model(model).put(future, early_exit, operating_point, layer_budget)
        return future

    def replace(
        self, model: Wrapped, *, tokenizer: Any = None, image_processor: Any = None, name: str | None = None
    ) -> None:
        """Answer later rows with another model; rows that have been submitted are answered by the former one.

        Args:
            model, tokenizer, image_processor: as for `Engine`.
            name: of the model to replace, where there are several.

        Raises:
            UsageError: as for `Engine`, also for a model whose exits are not those that the engine's monitor watches.
        """
        former = self._model(name)
        parts = {"tokenizer": tokenizer, "image_processor": image_processor}
        served = _Served(model, self._worker, former.monitor, **parts, **self._options)
        self._served[next(key for key, value in self._served.items() if value is former)] = served

    @property
    def models(self) -> dict[str, Any]:
        """The models by name; a single one is called "default"."""
        return {name: served.model for name, served in self._served.items()}

    @property
    def state(self) -> EngineState:
        """What the engine has done so far, and what it has to do."""
        return self._worker.state()

    @property
    def closed(self) -> bool:
        """Whether it takes no more rows here: it was closed, or was used before this process was forked."""
        return self._worker.closed or self._worker.of_another_process

    def close(self, drain: bool = True) -> None:
        """Take no more rows, and wait until those that were taken are answered.

        Args:
            drain: `False` fails them instead, with an error of the field "engine"; no further layer is begun.
        """
        self._worker.close(drain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.close(drain=kind is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: Any, *rest: Any) -> None:
        await asyncio.to_thread(self.close, kind is None)

    def _model(self, name: str | None) -> _Served:
        if name is None and len(self._served) == 1:
            return next(iter(self._served.values()))
        if name is None:
            raise UsageError(f"The engine serves {', '.join(self._served)}; say which: model=...", field="model")
        if not isinstance(name, str) or name not in self._served:
            raise unknown_name("model", name, tuple(self._served))
        return self._served[name]


class _Served:
    """A model of an engine: how its rows are read, and a scheduler for every way in which they are run."""

    def __init__(
        self,
        model: Wrapped,
        worker: Worker,
        monitor: Monitor | None,
        tokenizer: Any,
        image_processor: Any,
        max_batch_tokens: int | None,
        max_length: int | None,
        cuda_graphs: bool,
    ) -> None:
        self.model, self.worker, self.monitor = served_classifier(model), worker, monitor
        self.reader = reader_for(self.model, deepcopy(tokenizer), max_length, image_processor)
        self.walker = walker_for(self.model, cuda_graphs)
        self.budget = self.walker.best_batch_tokens if max_batch_tokens is None else max_batch_tokens
        self.schedulers: dict[Any, tuple[Any, Scheduler]] = {}
        self.scheduler(False, None, None, False)  # tells of a max_batch_tokens out of range
        if monitor is not None:
            require_classes(self.model.config.resolved_problem_type)
            if (exits := tuple(self.model.exit_layers)) != monitor.exit_layers:
                words = f"The monitor is of a model with exits behind {monitor.exit_layers}, and this one has them behind"
                raise UsageError(f"{words} {exits}; give it a monitor of its own.", field="monitor")

    def put(self, future: RowFuture, early_exit: bool | None, operating_point: str | None, budget: int | None) -> None:
        if self.monitor is not None and self.monitor.falls_back:
            early_exit, operating_point = False, None
        scheduler = self.scheduler(early_exit, operating_point, budget, future.ends_at < math.inf)
        self.worker.put(scheduler, self.reader, future, None if scheduler.policy is None else self.monitor)

    def scheduler(self, early_exit: bool | None, point: str | None, budget: int | None, clocked: bool) -> Scheduler:
        """The scheduler of rows that are run in one way, the same as long as the model keeps its policies."""
        if not isinstance(point, (str, NoneType)):
            self.model.policy_at(point)  # refuses what is no name
        config, layers = self.model.config, self.walker.exit_layers
        budget = None if budget is None or budget >= layers[-1] else budget
        values = config.exit_policy if point is None else (config.exit_operating_points or {}).get(point)
        key = (early_exit, point, budget, clocked)
        known = self.schedulers.get(key)
        if known is None or known[0] is not values:
            policy: ExitPolicy | None = self.model.choose_policy(early_exit, point, {})
            ends_at = math.inf if clocked else None
            known = self.schedulers[key] = values, Scheduler(self.walker, policy, self.budget, budget, ends_at)
        return known[1]


def _of(parts: Any, name: str) -> Any:
    """A part of one model, where they are given by name, or the one for all."""
    return parts.get(name) if isinstance(parts, dict) else parts

"""What both pipelines of classifiers add to the stock ones: the engine of `predict`, and the layer of every answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from torch.utils.data import Dataset

from ..errors import UsageError
from ..modeling.finite import check_finite
from ..problem_types import MULTI_LABEL, REGRESSION
from ..serving.monitor import Monitor, check_monitor
from ..serving.predict import monitored, stream_windows
from ..serving.reader import reader_for
from ..serving.served import form_of
from ..serving.tables import windows
from ..values import check_flags, check_whole
from .options import unknown_option

BY_ENGINE = 0  # in place of a batch size where none is given
OURS = {"operating_point", "early_exit", "cuda_graphs", "monitor", "window"}


class Rows(Dataset[Any]):
    """Rows of a table, each taken out when it is asked for."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place]


class ThroughEngine:
    """Put before a stock pipeline of classifiers.

    Attributes:
        window: rows that are read before the first of them is answered, where their number is known.
        tells_form: whether answers tell the model's form.
    """

    window: int
    tells_form: bool = False
    model: Any
    function_to_apply: Any
    _batch_size: int | None
    _num_workers: int | None

    def taken(self) -> set[str]:
        """Names of the options of the stock pipeline that are taken."""
        raise NotImplementedError

    def rows_of(self, inputs: Any) -> Any:
        """What was given to the pipeline as the stock one takes it: a row, a list, a generator or a torch data set."""
        raise NotImplementedError

    def encoded(self, row: Any, number: int, options: dict[str, Any]) -> Mapping[str, Any]:
        """What the engine reads of one row.

        Args:
            row: as given.
            number: of the row, for errors.
            options: of `preprocess`.
        """
        raise NotImplementedError

    def encoded_rows(self, rows: list[Any], first: int, options: dict[str, Any]) -> Iterable[Mapping[str, Any]]:
        """What the engine reads of several rows, the first of number `first`."""
        return (self.encoded(row, number, options) for number, row in enumerate(rows, first))

    def __call__(self, inputs: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        if batch_size is None and self._batch_size is None:
            batch_size = BY_ENGINE
            if kwargs.get("num_workers", self._num_workers) is not None:
                raise UsageError("num_workers is for batches of batch_size rows; give both or none.", field="num_workers")
        rows = self.rows_of(inputs)
        answers = super().__call__(rows, batch_size=batch_size, **kwargs)  # type: ignore[misc]
        return list(answers) if isinstance(rows, Rows) else answers

    def check_model_type(self, supported_models: Any) -> None:
        """Nothing: `pipeline` has looked at the model, and transformers' list knows no exported ones."""

    def _sanitize_parameters(
        self,
        operating_point: str | None = None,
        early_exit: bool | None = None,
        cuda_graphs: bool | None = None,
        monitor: Monitor | None = None,
        window: int | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = self.taken()
        for name in kwargs:
            if name not in known:
                raise unknown_option(name, OURS | {"batch_size"} | known)
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)  # type: ignore[misc]
        check_flags(early_exit=early_exit, cuda_graphs=cuda_graphs)
        if early_exit is not None:
            forward["early_exit"] = early_exit
        if cuda_graphs is not None:
            forward["cuda_graphs"] = cuda_graphs
        check_monitor(monitor)
        if monitor is not None:
            forward["monitor"] = monitor
        if window is not None:
            check_whole(1, window=window)
            forward["window"] = window
        if operating_point is not None:
            self.model.policy_at(operating_point)  # refuse an unknown name now
            forward["operating_point"] = operating_point
        return preprocess, forward, postprocess

    def _forward(
        self,
        model_inputs: Any,
        operating_point: str | None = None,
        early_exit: bool | None = None,
        cuda_graphs: bool = True,
        monitor: Monitor | None = None,
        window: int | None = None,
    ) -> Any:
        if monitor is None:
            output = self.model(**model_inputs, operating_point=operating_point, early_exit=early_exit)
        else:
            output = monitored(monitor, self.model, model_inputs, early_exit, operating_point)
        check_finite(output.logits, range(len(output.logits)))  # as the engine has done by itself
        return output

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        if batch_size != BY_ENGINE:
            stock: Iterator[Any] = super().get_iterator(  # type: ignore[misc]
                inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
            )
            return stock
        return self._through_engine(inputs, preprocess_params, forward_params, postprocess_params)

    def _through_engine(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        counted, reader = isinstance(inputs, Sized), reader_for(self.model)
        rows = (inputs[place] for place in range(len(inputs))) if counted else inputs
        read = windows(iter(rows), forward_params.pop("window", self.window if counted else 1))

        def encode(window: Sequence[Any], first: int) -> list[Any]:
            return reader.encode(list(self.encoded_rows(list(window), first, preprocess_params)), first)

        options = {"function_to_apply": self._function(), **postprocess_params}
        for answer in stream_windows(self.model, read, encode, counted=counted, **forward_params):
            score = None if math.isnan(answer.exit_score) else [answer.exit_score]
            outputs = {"logits": answer.logits[None], "exit_layer": [answer.exit_layer], "exit_score": score}
            yield self.postprocess(outputs, **options)

    def _function(self) -> Any:
        """What the stock pipeline makes scores by; left to itself, it asks the config for every answer, which is slow."""
        config, functions = self.model.config, type(self.function_to_apply)
        if config.problem_type == REGRESSION:
            return functions.NONE
        return functions.SIGMOID if config.problem_type == MULTI_LABEL or config.num_labels == 1 else functions.SOFTMAX

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        answer = super().postprocess(model_outputs, **kwargs)  # type: ignore[misc]
        layer, score = model_outputs["exit_layer"], model_outputs.get("exit_score")
        shown: dict[str, Any] = {"exit_layer": int(layer[0]), "exit_score": None if score is None else float(score[0])}
        if self.tells_form:
            shown["form"] = form_of(self.model)
        return [{**one, **shown} for one in answer] if isinstance(answer, list) else {**answer, **shown}

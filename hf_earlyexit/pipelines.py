"""Pipelines for text classification and captioning, with the layers that answers came from."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Iterator, Mapping, Sized
from os import PathLike
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Pipeline,
    TextClassificationPipeline,
)

from .captions.answers import told_caption
from .captions.model import EarlyExitVisionEncoderDecoder
from .doors import CAPTIONING
from .errors import CheckpointError, DataError, EarlyExitError, UsageError
from .images import open_image
from .modeling.certificate import warn_of_other_tokenizer
from .modeling.loading import check_config_file, check_input_parts
from .modeling.operating import OperatingPoints
from .modeling.wrapped import unwrapped
from .registry import unknown_name
from .serving.answers import check_finite
from .serving.predict import WINDOW, stream
from .serving.rows import TokenIds
from .serving.tables import MODEL_COLUMNS, windows

ENGINE = 0  # in place of a batch size where none is given
TOKENIZING = {"split_special_tokens"}  # taken by tokenizers without being among their named arguments
NOT_TOKENIZING = {"self", "text", "text_pair", "text_target", "text_pair_target", "return_tensors",
                  "return_overflowing_tokens", "is_split_into_words", "kwargs"}  # fmt: skip


class EarlyExitTextClassificationPipeline(TextClassificationPipeline):
    """The stock pipeline whose every answer also tells `exit_layer` (1 to L) and `exit_score`.

    Takes, when it is made and when it is called, `operating_point`, the name of the policy to use, `early_exit`, `False` for
    the full model, and `cuda_graphs`, as `predict` does; further `top_k`, `function_to_apply` and what the tokenizer takes.
    Any other option is refused. DataFrames, columns by name and data sets with texts are rows, as in `predict`.

    Lists and data sets run through the engine of `predict`, and a generator is read row by row. With `batch_size`, batches
    of so many rows, in the order they come, go through `forward`: the answers are then those of the stock pipeline, to the
    bit.

    Raises:
        UsageError: for an option that neither the pipeline nor the tokenizer takes, and for token ids in place of texts.
        DataError: for a row that is no text and no pair of texts, or whose answer is not finite.
    """

    def __call__(self, inputs: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        if batch_size is None and self._batch_size is None:
            batch_size = ENGINE
            if kwargs.get("num_workers", self._num_workers) is not None:
                raise UsageError("num_workers is for batches of batch_size rows; give both or none.", field="num_workers")
        return super().__call__(_texts_of(inputs), batch_size=batch_size, **kwargs)

    def check_model_type(self, supported_models: Any) -> None:
        """Nothing: `pipeline` has looked at the model, and transformers' list knows no exported ones."""

    def _sanitize_parameters(
        self,
        operating_point: str | None = None,
        early_exit: bool | None = None,
        cuda_graphs: bool | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        known = {"top_k", "function_to_apply"} | TOKENIZING
        if self.tokenizer is not None:
            known |= set(inspect.signature(type(self.tokenizer).__call__).parameters) - NOT_TOKENIZING
        for name in kwargs:
            if name not in known:
                raise _unknown_option(name, {"operating_point", "early_exit", "cuda_graphs", "batch_size"} | known)
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if early_exit is not None:
            forward["early_exit"] = early_exit
        if cuda_graphs is not None:
            forward["cuda_graphs"] = cuda_graphs
        if operating_point is not None:
            self.model.policy_at(operating_point)  # refuse an unknown name now
            forward["operating_point"] = operating_point
        return preprocess, forward, postprocess

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:
        if isinstance(inputs, (list, tuple)) and len(inputs) == 2 and all(isinstance(part, str) for part in inputs):
            inputs = {"text": inputs[0], "text_pair": inputs[1]}
        if isinstance(inputs, Mapping) and inputs.get("text_pair", "") is None:  # as `evaluate` gives one text
            inputs = {name: part for name, part in inputs.items() if name != "text_pair"}
        legacy = isinstance(inputs, list) and len(inputs) == 1 and isinstance(inputs[0], list)
        pair = isinstance(inputs, Mapping) and "text" in inputs and set(inputs) <= {"text", "text_pair"}
        if not (isinstance(inputs, str) or legacy or (pair and all(isinstance(part, str) for part in inputs.values()))):
            raise DataError(
                f'A row is {repr(inputs)[:80]}; expected a text, or {{"text": ..., "text_pair": ...}} for a pair.',
                field="inputs",
                value=inputs,
            )
        return super().preprocess(inputs, **tokenizer_kwargs)

    def _forward(
        self,
        model_inputs: Any,
        operating_point: str | None = None,
        early_exit: bool | None = None,
        cuda_graphs: bool = True,
    ) -> Any:
        return self.model(**model_inputs, operating_point=operating_point, early_exit=early_exit)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator[Any]:
        if batch_size != ENGINE:
            iterator = super().get_iterator
            return iterator(inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params)
        return self._through_engine(inputs, preprocess_params, forward_params, postprocess_params)

    def _through_engine(
        self, inputs: Any, preprocess_params: dict, forward_params: dict, postprocess_params: dict
    ) -> Iterator[Any]:
        def rows() -> Iterator[TokenIds]:
            for one in (inputs[place] for place in range(len(inputs))) if isinstance(inputs, Sized) else inputs:
                encoded = self.preprocess(one, **preprocess_params)
                yield {name: values[0].tolist() for name, values in encoded.items() if name in MODEL_COLUMNS}

        window = WINDOW if isinstance(inputs, Sized) else 1
        for answer in stream(self.model, rows(), window=window, **forward_params):
            score = None if math.isnan(answer.exit_score) else [answer.exit_score]
            told = {"logits": answer.logits[None], "exit_layer": [answer.exit_layer], "exit_score": score}
            yield self.postprocess(told, **postprocess_params)

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        check_finite(model_outputs["logits"], [0])
        answer = super().postprocess(model_outputs, **kwargs)
        layer, score = model_outputs["exit_layer"], model_outputs.get("exit_score")
        told = {"exit_layer": int(layer[0]), "exit_score": None if score is None else float(score[0])}
        return [{**one, **told} for one in answer] if isinstance(answer, list) else {**answer, **told}


class EarlyExitCaptioningPipeline(Pipeline):
    """Captions of pictures, and the layer that each token left the decoder after.

    Takes, when it is made and when it is called, `operating_point`, the name of the policy to use; `early_exit`, `False` for
    the full model; `max_new_tokens`, `num_beams` and, as the mapping `generate_kwargs`, anything else that `generate` takes.

    Raises:
        UsageError: for a model without exits, or one without a tokenizer or image processor.
        DataError: for what is no picture.
    """

    _load_tokenizer = True
    _load_image_processor = True
    _load_feature_extractor = False
    _load_processor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, EarlyExitVisionEncoderDecoder):
            raise _other_model(self.model)
        for name in ("tokenizer", "image_processor"):
            if getattr(self, name) is None:
                raise UsageError(
                    f"The {CAPTIONING} pipeline has no {name}; pass one, or save it beside the model with ee.save.",
                    field=name,
                )
        if self.tokenizer.pad_token_id is None:  # GPT-2's: transformers makes no batches without, of pictures neither
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        """Caption one picture, or each of several.

        Args:
            images: the name of a file, a PIL image, a list of these, or a generator or data set of them.
            kwargs: `batch_size`, which changes no answer, and what the class takes.

        Returns:
            For each picture `generated_text`; `tokens` and `exit_layers` (1 to L), the token that ends a caption included;
            `words`, each with its `word` and `exit_layer`, that of its deepest token; and `mean_exit_layer`. Where
            `num_return_sequences` is above 1, a list of these.

        Raises:
            DataError: for no picture, or what is none.
        """
        if isinstance(images, (list, tuple)) and not images:
            raise DataError("No pictures to caption: the list is empty.", field="images")
        return super().__call__(list(images) if isinstance(images, tuple) else images, **kwargs)

    def _sanitize_parameters(
        self,
        operating_point: str | None = None,
        early_exit: bool | None = None,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        for name in unknown:
            known = {"operating_point", "early_exit", "max_new_tokens", "num_beams", "generate_kwargs", "batch_size"}
            raise _unknown_option(name, known)
        if operating_point is not None and isinstance(self.model, EarlyExitVisionEncoderDecoder):
            self.model.policy_at(operating_point)  # refuse an unknown name now
        given: dict[str, Any] = {
            "operating_point": operating_point,
            "early_exit": early_exit,
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
        }
        named = {name: value for name, value in given.items() if value is not None}
        if twice := sorted(named.keys() & (generate_kwargs or {})):
            raise UsageError(f"{twice[0]} is given twice, by name and in generate_kwargs; give it once.", field=twice[0])
        return {}, {**named, **(generate_kwargs or {})}, {}

    def preprocess(self, image: Any) -> Any:
        pixels = self.image_processor(images=open_image(image), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels.to(self.dtype)}

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:
        pixels = model_inputs["pixel_values"]
        output = self.model.generate(pixels, return_exit_layers=True, **generate_kwargs)
        several = (len(pixels), -1, output.sequences.shape[-1])
        return {"sequences": output.sequences.reshape(several), "exit_layers": output.exit_layers.reshape(several)}

    def postprocess(self, model_outputs: Any) -> Any:
        told = []
        for ids, layers in zip(model_outputs["sequences"][0], model_outputs["exit_layers"][0], strict=True):
            made = layers > 0  # no prompt, no padding
            told.append(told_caption(self.tokenizer, ids[made].tolist(), layers[made].tolist()))
        return told[0] if len(told) == 1 else told


CLASSIFYING = "text-classification"
PIPELINES = {CLASSIFYING: EarlyExitTextClassificationPipeline, CAPTIONING: EarlyExitCaptioningPipeline}


def _task_of(model: Any) -> str | None:
    """What a model with exits is for; `None` for other models."""
    if not isinstance(model, OperatingPoints):
        return None
    return CAPTIONING if isinstance(model, EarlyExitVisionEncoderDecoder) else CLASSIFYING


def pipeline(task: str = "text-classification", model: Any = None, **kwargs: Any) -> Any:
    """`transformers.pipeline` for models with exits: answers also tell where they left.

    Args:
        task: "text-classification" or "early-exit-captioning".
        model: a model with exits, also within torch.compile, DataParallel or PEFT; or the folder or Hub id of one; or an
            `OnnxClassifier`, together with `tokenizer`.
        kwargs: as in `transformers.pipeline`; `operating_point`, the name of the policy to use; and for texts `cuda_graphs`,
            as in `predict`.

    Returns:
        A pipeline; call it with a text or a picture, or a list of them.

    Raises:
        UsageError: for a model without exits, or one for another task.
        UnknownNameError: for another task.
        CheckpointError: if the model is damaged.
    """
    if task not in PIPELINES:
        raise unknown_name("task", task, tuple(PIPELINES))
    kind = PIPELINES[task]
    if isinstance(model, (str, PathLike)):
        check_config_file(model)
        if kind is EarlyExitCaptioningPipeline:
            check_input_parts(model, kwargs)
    elif model is not None:
        model = unwrapped(model)
        if _task_of(model) != task:
            raise _other_model(model)
    try:
        pipe = transformers.pipeline(task, model=model, pipeline_class=kind, **kwargs)
    except EarlyExitError:
        raise
    except Exception as error:  # transformers wraps what a class said of a damaged folder into pages of its own
        if isinstance(model, (str, PathLike)) and Path(model).is_dir():
            _check_parts(Path(model), task, "tokenizer" not in kwargs, error)
        raise
    if _task_of(pipe.model) != task:
        raise _other_model(pipe.model)
    warn_of_other_tokenizer(pipe.model, pipe.tokenizer)
    return pipe


def _check_parts(folder: Path, task: str, with_tokenizer: bool, error: Exception) -> None:
    """Load the parts of a folder one by one, to tell which of them is damaged.

    Raises:
        CheckpointError: naming it.
    """
    auto = AutoModelForSequenceClassification if task == CLASSIFYING else AutoModelForImageTextToText
    parts = {"model": auto, "tokenizer": AutoTokenizer} if with_tokenizer else {"model": auto}
    for part, loader in parts.items():
        try:
            loader.from_pretrained(folder)
        except EarlyExitError as fault:
            raise fault from None
        except Exception as fault:  # files of many kinds fail in many ways
            reason = next(iter(str(fault).splitlines()), type(fault).__name__)[:300]
            raise CheckpointError(
                f"The {part} in {folder} cannot be loaded ({reason}). Restore the folder's files.", field=part, path=folder
            ) from error


def _texts_of(inputs: Any) -> Any:
    """Texts and pairs where whole columns are given; anything else as it is."""
    named = isinstance(inputs, Mapping) and not all(isinstance(part, str) for part in inputs.values())
    if not (named or hasattr(inputs, "column_names") or hasattr(inputs, "columns")):
        return inputs
    return [_text_of(row) for window in windows(inputs, WINDOW) for row in window]


def _text_of(row: Any) -> Any:
    if isinstance(row, Mapping):
        raise UsageError("A pipeline takes texts, not token ids; predict(model, rows) takes both.", field="inputs")
    return {"text": row[0], "text_pair": row[1]} if isinstance(row, tuple) else row


def _unknown_option(name: str, known: set[str]) -> UsageError:
    near = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"The pipeline takes no {name!r}.{hint} It takes {', '.join(sorted(known))}.", field=name)


def _other_model(model: Any) -> UsageError:
    name, task = type(model).__name__, _task_of(model)
    if task is not None:
        return UsageError(f"{name} is for another task: ee.pipeline({task!r}, ...).", field="task", value=task)
    return UsageError(f"{name} has no exits; use transformers.pipeline, or give it exits first.", field="model")

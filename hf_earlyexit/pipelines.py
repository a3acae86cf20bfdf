"""Pipelines for text classification and captioning, with the layers that answers came from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sized
from os import PathLike
from typing import Any

import transformers
from transformers import Pipeline, TextClassificationPipeline

from .captions.answers import told_caption
from .captions.model import EarlyExitVisionEncoderDecoder
from .doors import CAPTIONING
from .errors import DataError, UsageError
from .images import open_image
from .modeling.certificate import warn_of_other_tokenizer
from .modeling.loading import check_config_file, check_input_parts
from .modeling.operating import OperatingPoints
from .registry import unknown_name
from .serving.predict import WINDOW, stream
from .serving.rows import TokenIds
from .serving.tables import MODEL_COLUMNS

ENGINE = 0  # in place of a batch size where none is given


class EarlyExitTextClassificationPipeline(TextClassificationPipeline):
    """The stock pipeline whose every answer also tells `exit_layer` (1 to L) and `exit_score`.

    Takes, when it is made and when it is called, `operating_point`, the name of the policy to use, and `cuda_graphs`, as
    `predict` does. Lists and data sets run through the engine of `predict`, and a generator is read row by row. With
    `batch_size`, batches of so many rows, in the order they come, go through `forward`: the answers are then those of the
    stock pipeline, to the bit.
    """

    def __call__(self, inputs: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        if batch_size is None and self._batch_size is None:
            batch_size = ENGINE
        return super().__call__(inputs, batch_size=batch_size, **kwargs)

    def _sanitize_parameters(
        self, operating_point: str | None = None, cuda_graphs: bool | None = None, **kwargs: Any
    ) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if cuda_graphs is not None:
            forward["cuda_graphs"] = cuda_graphs
        if operating_point is not None:
            self.model.policy_at(operating_point)  # refuse an unknown name now
            forward["operating_point"] = operating_point
        return preprocess, forward, postprocess

    def _forward(self, model_inputs: Any, operating_point: str | None = None, cuda_graphs: bool = True) -> Any:
        return self.model(**model_inputs, operating_point=operating_point)

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
    ) -> tuple[dict, dict, dict]:
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
        model: a model with exits, or the folder or Hub id of one; or an `OnnxClassifier`, together with `tokenizer`.
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
    elif model is not None and _task_of(model) != task:
        raise _other_model(model)
    pipe = transformers.pipeline(task, model=model, pipeline_class=kind, **kwargs)
    if _task_of(pipe.model) != task:
        raise _other_model(pipe.model)
    warn_of_other_tokenizer(pipe.model, pipe.tokenizer)
    return pipe


def _other_model(model: Any) -> UsageError:
    name, task = type(model).__name__, _task_of(model)
    if task is not None:
        return UsageError(f"{name} is for another task: ee.pipeline({task!r}, ...).", field="task", value=task)
    return UsageError(f"{name} has no exits; use transformers.pipeline, or give it exits first.", field="model")

"""The text-classification pipeline, with the layer each answer came from."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import TextClassificationPipeline

from .errors import UsageError
from .modeling.certificate import warn_of_other_tokenizer
from .modeling.operating import OperatingPoints


class EarlyExitTextClassificationPipeline(TextClassificationPipeline):
    """The stock pipeline whose every answer also tells `exit_layer` (1 to L) and `exit_score`.

    Takes `operating_point`, when it is made and when it is called: the name of the policy to use.
    """

    def _sanitize_parameters(self, operating_point: str | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if operating_point is not None:
            self.model.policy_at(operating_point)  # refuse an unknown name now
            forward["operating_point"] = operating_point
        return preprocess, forward, postprocess

    def _forward(self, model_inputs: Any, operating_point: str | None = None) -> Any:
        return self.model(**model_inputs, operating_point=operating_point)

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        answer = super().postprocess(model_outputs, **kwargs)
        layer, score = model_outputs["exit_layer"], model_outputs.get("exit_score")
        told = {"exit_layer": int(layer[0]), "exit_score": None if score is None else float(score[0])}
        return [{**one, **told} for one in answer] if isinstance(answer, list) else {**answer, **told}


def pipeline(task: str = "text-classification", model: Any = None, **kwargs: Any) -> Any:
    """`transformers.pipeline` for models with exits: answers also tell where they left.

    Args:
        task: "text-classification".
        model: a model with exits, or the folder or Hub id of one; or an `OnnxClassifier`, together with `tokenizer`.
        kwargs: as in `transformers.pipeline`, and `operating_point`, the name of the policy to use.

    Returns:
        A pipeline; call it with a text or a list of texts.

    Raises:
        UsageError: for a model without exits.
    """
    pipe = transformers.pipeline(task, model=model, pipeline_class=EarlyExitTextClassificationPipeline, **kwargs)
    if not isinstance(pipe.model, OperatingPoints):
        raise UsageError(
            f"{type(pipe.model).__name__} has no exits; use transformers.pipeline, or give it exits first.", field="model"
        )
    warn_of_other_tokenizer(pipe.model, pipe.tokenizer)
    return pipe

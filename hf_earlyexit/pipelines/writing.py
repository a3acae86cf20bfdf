"""The pipeline of language models, with the layer that each token came from."""

from __future__ import annotations

from typing import Any

from transformers import TextGenerationPipeline

from ..generation.language_model import EarlyExitLanguageModel
from .options import other_model


class EarlyExitTextGenerationPipeline(TextGenerationPipeline):
    """Texts that go on from prompts or chats, and the layer that each new token left the model after.

    As the stock pipeline, which takes the same models. Each record has `exit_layers` (1 to L) of the new tokens, the one
    that ends a text included, and their mean, `mean_exit_layer`. Takes what `generate` takes, `operating_point`,
    `early_exit` and `lossless` among it, when it is made and when it is called.

    Raises:
        UsageError: for a model without exits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        if not isinstance(self.model, EarlyExitLanguageModel):
            raise other_model(self.model)

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:  # type: ignore[override]
        kwargs = {**generate_kwargs, "return_exit_layers": True}
        return super()._forward(model_inputs, **kwargs)  # type: ignore[no-untyped-call]

    def postprocess(self, model_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        layers = model_outputs.pop("exit_layers")[0].tolist()
        records = super().postprocess(model_outputs, *args, **kwargs)  # type: ignore[no-untyped-call]
        for record, row in zip(records, layers, strict=True):
            record["exit_layers"] = [layer for layer in row if layer > 0]  # no prompt, no padding
            record["mean_exit_layer"] = sum(record["exit_layers"]) / max(len(record["exit_layers"]), 1)
        return records

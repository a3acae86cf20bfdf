"""The pipeline of captioners, with the layer that each token came from."""

from __future__ import annotations

import copy
from typing import Any

from transformers import Pipeline

from ..captions.answers import caption_entry
from ..captions.model import EarlyExitVisionEncoderDecoder
from ..doors import CAPTIONING
from ..errors import DataError, UsageError
from ..serving.pictures import encode_picture
from ..serving.tables import PIXELS
from .engine import Rows
from .options import other_model, unknown_option
from .pictures import picture_rows


class EarlyExitCaptioningPipeline(Pipeline):
    """Captions of pictures, and the layer that each token left the decoder after.

    Takes, when it is made and when it is called, `operating_point`, the name of the policy to use; `early_exit`, `False` for
    the full model; `lossless`, `True` for the full model's own captions, with drafts; `max_new_tokens`, `num_beams` and, as
    the mapping `generate_kwargs`, anything else that `generate` takes.

    Raises:
        UsageError: for a model without exits, or one without a tokenizer or image processor.
        DataError: for what is no picture.
    """

    _load_tokenizer: Any = True
    _load_image_processor: Any = True
    _load_feature_extractor: Any = False
    _load_processor: Any = False
    tokenizer: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, EarlyExitVisionEncoderDecoder):
            raise other_model(self.model)
        for name in ("tokenizer", "image_processor"):
            if getattr(self, name) is None:
                raise UsageError(
                    f"The {CAPTIONING} pipeline has no {name}; pass one, or save it beside the model with ee.save.",
                    field=name,
                )
        if self.tokenizer.pad_token_id is None:  # GPT-2's: transformers makes no batches without, of pictures neither
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, images: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Caption one picture, or each of several.

        Args:
            images: the name of a file, a PIL image, an array of bytes, a list of these or a generator of them; or a data
                set, DataFrame or columns by name with a column called image, img, picture, file_name or pixel_values.
            kwargs: `batch_size`, which changes no answer, and what the class takes.

        Returns:
            For each picture `generated_text`; `tokens` and `exit_layers` (1 to L), the token that ends a caption included;
            `words`, each with its `word` and `exit_layer`, that of its deepest token; and `mean_exit_layer`. Where
            `num_return_sequences` is above 1, a list of these.

        Raises:
            DataError: for no picture, what is none, or an answer that is not finite, naming the row of its batch.
        """
        rows = picture_rows(images)
        if isinstance(rows, (list, Rows)) and not len(rows):
            raise DataError("No pictures to caption: the list is empty.", field="images")
        answers = super().__call__(rows, **kwargs)  # type: ignore[no-untyped-call]
        return list(answers) if isinstance(rows, Rows) else answers

    def _sanitize_parameters(
        self,
        operating_point: str | None = None,
        early_exit: bool | None = None,
        lossless: bool | None = None,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name in unknown:
            known = {"operating_point", "early_exit", "lossless", "max_new_tokens", "num_beams", "generate_kwargs"}
            raise unknown_option(name, {*known, "batch_size"})
        if operating_point is not None and isinstance(self.model, EarlyExitVisionEncoderDecoder):
            self.model.policy_at(operating_point)  # refuse an unknown name now
        given: dict[str, Any] = {
            "operating_point": operating_point,
            "early_exit": early_exit,
            "lossless": lossless,
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
        }
        named = {name: value for name, value in given.items() if value is not None}
        if twice := sorted(named.keys() & (generate_kwargs or {})):
            raise UsageError(f"{twice[0]} is given twice, by name and in generate_kwargs; give it once.", field=twice[0])
        return {}, {**named, **(generate_kwargs or {})}, {}

    def preprocess(self, image: Any) -> Any:  # type: ignore[override]
        return {PIXELS: encode_picture(image, self.image_processor, "The row")[None].to(self.dtype)}

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:  # type: ignore[override]
        pixels = model_inputs[PIXELS]
        output = self.model.generate(pixels, return_exit_layers=True, **generate_kwargs)
        several = (len(pixels), -1, output.sequences.shape[-1])
        return {"sequences": output.sequences.reshape(several), "exit_layers": output.exit_layers.reshape(several)}

    def postprocess(self, model_outputs: Any) -> Any:  # type: ignore[override]
        captions = []
        for ids, layers in zip(model_outputs["sequences"][0], model_outputs["exit_layers"][0], strict=True):
            made = layers > 0  # no prompt, no padding
            captions.append(caption_entry(self.tokenizer, ids[made].tolist(), layers[made].tolist()))
        return captions[0] if len(captions) == 1 else captions

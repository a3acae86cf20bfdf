"""Pictures and texts in, tensors for a captioner out: what the stock image-text-to-text pipeline asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from ..errors import CheckpointError, DataError, EarlyExitError, UsageError
from ..files import read_json
from ..modeling.loading import INPUT_PARTS
from ..values import is_whole, shown


class EarlyExitCaptionProcessor(ProcessorMixin):
    """An image processor and a tokenizer as one, so that `pipeline("image-text-to-text")` takes a captioner.

    Args:
        image_processor: of the encoder.
        tokenizer: of the decoder.
        start_token_id: what captions begin with; the tokenizer's BOS or CLS by default.

    Examples:
        >>> import hf_earlyexit as ee
        >>> processor = ee.EarlyExitCaptionProcessor.from_pretrained("captioner")  # doctest: +SKIP
        >>> model.generate(**processor(images=picture, text="a photo of"))  # doctest: +SKIP
    """

    def __init__(self, image_processor: Any, tokenizer: Any, start_token_id: int | None = None, **kwargs: Any) -> None:
        if start_token_id is not None and not is_whole(start_token_id):
            raise UsageError(
                f"start_token_id is {shown(start_token_id)}; expected a token's number, or None.", field="start_token_id"
            )
        super().__init__(image_processor, tokenizer, **kwargs)  # type: ignore[no-untyped-call]
        self.start_token_id = start_token_id

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a damaged folder is refused by file.

        Raises:
            CheckpointError: naming the file where it is known, else the folder.
        """
        folder = Path(pretrained_model_name_or_path)
        for name in {file for files in INPUT_PARTS.values() for file in files}:
            if (folder / name).is_file():
                read_json(folder / name, finite=False)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:  # tokenizers raise the base class itself
            if isinstance(error, EarlyExitError) and error.path is not None:
                raise
            raise CheckpointError(
                f"The processor in {folder} cannot be loaded: {' '.join(str(error).split())}. Save it there again.",
                field=getattr(error, "field", None),
                path=folder,
            ) from error

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Tensors for `generate`.

        Args:
            images: a picture or several, as the image processor takes them.
            text: what each caption begins with, one for each picture; nothing by default.
            kwargs: of other processors, and ignored: nothing is padded or cut, and tensors are always PyTorch's.

        Returns:
            `pixel_values` `[B, 3, H, W]`, and `decoder_input_ids` `[B, T]` that begin with the start token.

        Raises:
            DataError: without a picture, if texts are not one for each, or if they differ in their number of tokens.
            UsageError: if nobody has said what captions begin with.
        """
        if images is None or (isinstance(images, (list, tuple)) and not images):
            raise DataError("No pictures: a captioner needs at least one.", field="images")
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        texts = [text or ""] * len(pixels) if text is None or isinstance(text, str) else list(text)
        if len(texts) != len(pixels):
            raise DataError(
                f"{len(texts)} texts for {len(pixels)} pictures; expected one for each.", field="text", value=len(texts)
            )
        prompts = [[self._start, *self.tokenizer(one, add_special_tokens=False)["input_ids"]] for one in texts]
        lengths = {len(prompt) for prompt in prompts}
        if len(lengths) > 1:  # stock decoders number the positions from the padding on
            raise DataError(
                f"The texts have {min(lengths) - 1} to {max(lengths) - 1} tokens, and padding would change captions; pass "
                "pictures whose texts differ in length one at a time.",
                field="text",
            )
        return BatchFeature({"pixel_values": pixels, "decoder_input_ids": torch.tensor(prompts)})

    @property
    def _start(self) -> int:
        for token in (self.start_token_id, self.tokenizer.bos_token_id, self.tokenizer.cls_token_id):
            if token is not None:
                return int(token)
        raise UsageError("What do captions begin with? Give the processor its start_token_id.", field="start_token_id")

"""Configuration of a captioner whose decoder has exits."""

# No `from __future__ import annotations` here: it would turn the type checks of strict configs off without a word.
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import VisionEncoderDecoderConfig

from ..families.decoders import crossing_backbone
from ..generation.configuration import EarlyExitTokenConfig
from ..modeling.sizes import wrong
from ..values import MOST_LAYERS, is_whole


@strict
class EarlyExitVisionEncoderDecoderConfig(EarlyExitTokenConfig, VisionEncoderDecoderConfig):
    """`VisionEncoderDecoderConfig` and the fields of `EarlyExitTokenConfig`; the exits are those of the decoder.

    Encoder and decoder keep their stock configurations, so that the stock class reads the folders too.

    Raises:
        EarlyExitConfigError: naming the field, its value and what is allowed.

    Examples:
        >>> import hf_earlyexit as ee
        >>> from transformers import GPT2Config, ViTConfig
        >>> decoder = GPT2Config(n_layer=6, add_cross_attention=True)
        >>> ee.EarlyExitVisionEncoderDecoderConfig(encoder=ViTConfig(), decoder=decoder).exit_layers
        [1, 2, 3, 4, 5, 6]
    """

    model_type = "early_exit_vision_encoder_decoder"
    stock_model_type = "vision-encoder-decoder"
    door = "EarlyExitVisionEncoderDecoder"
    auto_models = ("AutoModel", "AutoModelForImageTextToText")
    if TYPE_CHECKING:  # configs by now, whatever they came as
        encoder: Any
        decoder: Any

    @property
    def num_exit_layers(self) -> int:
        layers: int = self.decoder.num_hidden_layers
        return layers

    @property
    def word_config(self) -> Any:
        return self.decoder

    def check_labels(self) -> None:
        """Captioners have none; refuses what decoding cannot use instead."""
        decoder = self.decoder
        crossing_backbone(decoder.model_type)
        layers = getattr(self.encoder, "num_hidden_layers", None)
        if layers is not None and not is_whole(layers, 1, MOST_LAYERS):
            raise wrong("encoder.num_hidden_layers", layers, f"a whole number from 1 to {MOST_LAYERS}")
        if getattr(self.encoder, "hidden_size", None) is None:  # such as ConvNeXt and ResNet
            raise wrong(
                "encoder.model_type",
                self.encoder.model_type,
                "an encoder with a hidden_size, whose states are a sequence [B, T, H], such as vit, deit, dinov2 or swin",
            )
        if not decoder.add_cross_attention:
            raise wrong("decoder.add_cross_attention", False, "true: the decoder looks at the image")
        super().check_labels()

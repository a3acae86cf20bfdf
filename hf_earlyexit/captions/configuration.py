"""Configuration of a captioner whose decoder has exits."""

# No `from __future__ import annotations` here: it would turn the type checks of strict configs off without a word.
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import VisionEncoderDecoderConfig

from ..families.decoders import CACHE_NAMES, decoder_backbone
from ..generation.word_heads import WORD_HEADS
from ..modeling.configuration import EarlyExitConfig
from ..modeling.sizes import wrong
from ..problem_types import SINGLE_LABEL
from ..registry import Registry
from ..values import MOST_LAYERS, is_real, is_whole

SIGNALS = ("vocabulary", "shortlist")


@strict
class EarlyExitVisionEncoderDecoderConfig(EarlyExitConfig, VisionEncoderDecoderConfig):
    """`VisionEncoderDecoderConfig` and the fields of `EarlyExitConfig`; the exits are those of the decoder.

    Encoder and decoder keep their stock configurations, so that the stock class reads the folders too.

    Args:
        exit_head: "tied" (the decoder's own head), "tuned" (a linear map, then that head), "linear" (a head of its own) or
            "low-rank".
        exit_rank: width of "low-rank" heads.
        exit_signal: what rules that read answers look at: "vocabulary", every word, or "shortlist", the words of
            `set_exit_shortlist`; the answer is then made once, by the full head, where the token leaves.
        exit_shortlist: how many words the shortlist has; `None` for no shortlist.
        exit_decay: thresholds of bounded rules start higher and fall with every token, by `exp(-exit_decay * token)`; 0 or
            above; `None` for thresholds that stay as they are.

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
    heads: ClassVar[Registry] = WORD_HEADS
    # a list, as Trainer adds another to it
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exit_logits", "exit_scalars", "exit_layer", *CACHE_NAMES]

    exit_head: str = "tied"
    exit_rank: int = 64
    exit_signal: str = "vocabulary"
    exit_shortlist: int | None = None
    exit_decay: float | None = None

    @property
    def num_exit_layers(self) -> int:
        return self.decoder.num_hidden_layers

    @property
    def resolved_problem_type(self) -> str:
        """The next token is one of the vocabulary."""
        return SINGLE_LABEL

    def check_labels(self) -> None:
        """Captioners have none; refuses what decoding cannot use instead."""
        decoder = self.decoder
        decoder_backbone(decoder.model_type)
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
        if not is_whole(self.exit_rank, 1, 1 << 20):
            raise wrong("exit_rank", self.exit_rank, "a whole number above 0")
        if self.exit_signal not in SIGNALS:
            raise wrong("exit_signal", self.exit_signal, f"one of {', '.join(SIGNALS)}")
        if self.exit_shortlist is not None and not is_whole(self.exit_shortlist, 2, decoder.vocab_size):
            raise wrong("exit_shortlist", self.exit_shortlist, f"a number of words from 2 to {decoder.vocab_size}")
        if self.exit_signal == "shortlist" and self.exit_shortlist is None:
            raise wrong("exit_shortlist", None, "a number of words, as exit_signal is 'shortlist'")
        if self.exit_gate == "mlp+logits":
            raise wrong("exit_gate", self.exit_gate, "'linear' or 'mlp': here gates are asked so that no logits are needed")
        if self.exit_decay is not None and not is_real(self.exit_decay, 0):
            raise wrong("exit_decay", self.exit_decay, "a number of at least 0, or null")

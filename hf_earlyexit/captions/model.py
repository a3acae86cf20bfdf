"""Captioners: a vision encoder that runs in full, and a text decoder that each token leaves where it is decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

from ..families.decoders import DecoderBackbone, cache_name, crossing_backbone, given_cache
from ..generation.decoding import ExitRun, decode
from ..generation.token_exits import ModelThatWrites
from ..modeling.outputs import EarlyExitCaptionerOutput
from .checks import check_caption_tokens, check_pixel_values
from .configuration import EarlyExitVisionEncoderDecoderConfig
from .labels import decoder_inputs, read_caption_labels


class EarlyExitVisionEncoderDecoder(ModelThatWrites, VisionEncoderDecoderModel):  # type: ignore[misc]
    """`VisionEncoderDecoderModel` whose decoder has exits.

    Loads any plain checkpoint with a GPT-2 or BERT decoder and, run in full, generates what the stock class does; the stock
    class reads the folders it saves. With a policy `generate` runs, for each row and token, only the layers that the token
    needs: layers above get its keys and values from the state it left with. The prompt, and with it the first token, always
    runs in full.

    Examples:
        >>> import hf_earlyexit as ee
        >>> from transformers import GPT2Config, ViTConfig
        >>> decoder = GPT2Config(vocab_size=50, n_embd=32, n_layer=4, n_head=2, add_cross_attention=True)
        >>> encoder = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> config = ee.EarlyExitVisionEncoderDecoderConfig(encoder=encoder, decoder=decoder)
        >>> ee.EarlyExitVisionEncoderDecoder(config).exit_layers
        (1, 2, 3, 4)
    """

    config_class = EarlyExitVisionEncoderDecoderConfig
    crosses = True
    config: EarlyExitVisionEncoderDecoderConfig

    def __init__(self, config: Any = None, encoder: Any = None, decoder: Any = None) -> None:
        if config is None and encoder is not None and decoder is not None:
            config = EarlyExitVisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)
        if type(config) is VisionEncoderDecoderConfig:  # as `from_encoder_decoder_pretrained` makes it
            values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
            config = EarlyExitVisionEncoderDecoderConfig(**values)
        config = self.config_class.from_stock(config)
        config.check_exits()  # values given to from_pretrained were set after the config checked itself
        super().__init__(config, encoder, decoder)
        self.add_exits()
        self.post_init()

    # --- walking --------------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> DecoderBackbone:  # type: ignore[override]
        """How to walk the decoder."""
        return crossing_backbone(self.config.decoder.model_type)

    @property
    def token_decoder(self) -> Any:
        """The stock decoder with its head."""
        return self.decoder

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers, for the decoder and the vocabulary layers of its exits alike.

        Thresholds that were calibrated before are no longer vouched for. A shortlist stays, but for words that are gone.

        Args:
            new_num_tokens, pad_to_multiple_of, mean_resizing: as in transformers.

        Returns:
            The decoder's embeddings.
        """
        embeddings = self.decoder.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.resize_exits(mean_resizing)
        return embeddings

    def forward(
        self,
        pixel_values: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        early_exit: bool | None = None,
        operating_point: str | None = None,
        exit_tokens: Tensor | None = None,
        asked_exits: Sequence[int] | None = None,
        token_exits: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in the stock model; in training, and with `early_exit=False`, every exit answers.

        Tokens leave early where they are decoded one at a time over a cache, as `generate` does it; a caption that is given
        whole runs in full.

        Args:
            pixel_values: `[B, 3, H, W]`; or `encoder_outputs`.
            decoder_input_ids: `[B, T]`; made from the labels where those are given.
            labels: `[B, T]`, -100 where nothing is learned. In training the loss is the mean over all exits weighted by
                depth.
            early_exit, operating_point: as in `generate`.
            exit_tokens: booleans `[B, T]` with N true: where every exit answers, only these tokens get `exit_logits`
                `[N, E, V]` and `exit_scalars` `[N, E - 1]`; that saves memory in training.
            asked_exits: numbers (0-based) of the exits that answer, ascending, the last among them, where not all need to.
            token_exits: what `generate` carries from token to token.
            decoder_attention_mask, cache, decoder_inputs_embeds, use_cache, return_dict, kwargs: as in the stock model; the
                cache by any name that a release of transformers gave it.

        Raises:
            UsageError: for early exit without a policy, in training, or over a cache whose rows cannot be taken apart.
            DataError: for images that the encoder does not take, and labels that are no captions.
            TrainingError: if no start or padding token is set to make the decoder's inputs from the labels.
        """
        if pixel_values is not None:
            check_pixel_values(pixel_values, self, kwargs.get("interpolate_pos_encoding", False))
        if labels is not None:
            labels = read_caption_labels(labels, self.config.decoder, pixel_values, decoder_input_ids)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = decoder_inputs(labels, self)
        cache = given_cache(cache, kwargs)
        run, decodes = self.run_of(
            decoder_input_ids, labels, cache, use_cache, early_exit, operating_point, token_exits, kwargs
        )
        if decodes:
            given = {name.removeprefix("decoder_"): value for name, value in kwargs.items() if name.startswith("decoder_")}
            states, mask = encoder_outputs[0], decoder_attention_mask
            logits, exit_layer = decode(self, decoder_input_ids, mask, states, cache, run, given)  # type: ignore[arg-type]
            cached = {cache_name(EarlyExitCaptionerOutput): cache}
            output = EarlyExitCaptionerOutput(
                logits=logits, encoder_last_hidden_state=states, exit_layer=exit_layer, **cached
            )
        else:
            every_exit = token_exits is None and (self.training or early_exit is False)
            hidden_wanted = kwargs.pop("output_hidden_states", None)
            output = EarlyExitCaptionerOutput(
                **super().forward(
                    pixel_values=pixel_values,
                    decoder_input_ids=decoder_input_ids,
                    decoder_attention_mask=decoder_attention_mask,
                    encoder_outputs=encoder_outputs,
                    decoder_inputs_embeds=decoder_inputs_embeds,
                    labels=labels,
                    use_cache=use_cache,
                    return_dict=True,
                    output_hidden_states=every_exit or hidden_wanted,
                    **{cache_name(VisionEncoderDecoderModel.forward): cache},
                    **kwargs,
                )
            )
            if every_exit:
                self.ask_every_exit(output, output.decoder_hidden_states, labels, exit_tokens, asked_exits)
                if not hidden_wanted:
                    output.decoder_hidden_states = output.encoder_hidden_states = None
        return self.handed_back(output, run, token_exits is not None, return_dict)

    def prepare_decoder_input_ids_from_labels(self, labels: Any) -> Tensor:
        """What the decoder reads to write captions `[B, T]`: the start token, then all tokens but the last.

        Raises:
            DataError: for labels that are no captions, naming row and token.
            TrainingError: if no start or padding token is set.
        """
        return decoder_inputs(read_caption_labels(labels, self.config.decoder), self)

    def check_inputs(self, inputs: Any, settings: Any, options: dict[str, Any]) -> int:
        images = options.get("pixel_values") if inputs is None else inputs
        if images is not None or options.get("encoder_outputs") is None:
            check_pixel_values(images, self, options.get("interpolate_pos_encoding", False))
        self.check_tokens(settings, options)
        return len(options["encoder_outputs"][0] if images is None else images)

    def check_tokens(self, settings: Any, options: Any) -> None:
        check_caption_tokens(settings, options)

    # --- what it is asked to write ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def read_prompts(self, rows: Any, tokenizer: Any, image_processor: Any, batch_size: int) -> list[Tensor]:
        """The encoder's last states of all images `[tokens, width]`, on the CPU: made once for many runs of the decoder."""
        from .batches import image_batches  # with what opens pictures, which the model itself does not need

        states: list[Tensor] = []
        for batch in image_batches(rows, image_processor, batch_size):
            if "encoder_outputs" in batch:
                states.extend(batch["encoder_outputs"][0])
            else:
                pixels = batch["pixel_values"].to(self.device, self.dtype)
                states.extend(self.encoder(pixel_values=pixels).last_hidden_state.cpu())
        return states

    def prompt_inputs(self, prompts: Sequence[Any]) -> dict[str, Any]:
        return {"encoder_outputs": BaseModelOutput(torch.stack(list(prompts)).to(self.device, self.dtype))}

    def full_pass(self, inputs: dict[str, Any], ids: Tensor, start: int) -> tuple[list[Tensor], Tensor]:
        output = self(**inputs, decoder_input_ids=ids, token_exits=ExitRun(None), output_hidden_states=True, use_cache=False)
        return [states[:, start:] for states in output.decoder_hidden_states], output.logits[:, start:]

    def read_images(self, states: Tensor, cache: Any) -> None:
        if hasattr(self, "enc_to_dec_proj"):
            states = self.enc_to_dec_proj(states)
        for index, layer in enumerate(self.backbone.layers(self.decoder)):
            keys, values = self.backbone.project_image(layer, states)
            cache.cross_attention_cache.update(keys, values, index)
            cache.is_updated[index] = True
            cache.self_attention_cache.update(keys[:, :, :0], values[:, :, :0], index)

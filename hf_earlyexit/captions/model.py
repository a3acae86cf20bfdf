"""Captioners: a vision encoder that runs in full, and a text decoder that each token leaves where it is decided."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel
from transformers import initialization as init

from ..errors import UsageError
from ..families.decoders import DecoderBackbone, cache_name, decoder_backbone, given_cache
from ..generation.decoding import EndWatch, ExitRun, decode, exit_layers_of
from ..generation.token_cache import require_dynamic, takes_apart
from ..generation.word_heads import LAST, Shift, StockHead, WordHead, frequent_words, new_word_head
from ..losses import WeightedObjective
from ..modeling.exits import ModelWithExits
from ..modeling.finite import check_finite
from ..modeling.gates import new_gates
from ..modeling.outputs import EarlyExitCaptionerOutput
from ..problem_types import SINGLE_LABEL
from .checks import check_generation, check_images, generation_settings
from .configuration import EarlyExitVisionEncoderDecoderConfig
from .labels import decoder_inputs, read_caption_labels


class EarlyExitVisionEncoderDecoder(ModelWithExits, VisionEncoderDecoderModel):
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
    config: EarlyExitVisionEncoderDecoderConfig
    accepts_loss_kwargs = False  # the loss is a mean over the batch; Trainer divides it when it accumulates

    def __init__(self, config: Any = None, encoder: Any = None, decoder: Any = None) -> None:
        if config is None and encoder is not None and decoder is not None:
            config = EarlyExitVisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)
        if type(config) is VisionEncoderDecoderConfig:  # as `from_encoder_decoder_pretrained` makes it
            values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
            config = EarlyExitVisionEncoderDecoderConfig(**values)
        config = self.config_class.from_stock(config)
        config.check_exits()  # values given to from_pretrained were set after the config checked itself
        super().__init__(config, encoder, decoder)
        words = config.decoder
        self.exit_heads = nn.ModuleDict(
            {str(layer): new_word_head(config.exit_head, words, config.exit_rank) for layer in config.exit_layers[:-1]}
        )
        self.exit_gates = new_gates(config, words.hidden_size, words.vocab_size)
        if config.exit_shortlist is not None:
            self.register_buffer("exit_shortlist", torch.arange(config.exit_shortlist))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Shift):
            init.zeros_(module.weight)
        elif module is self and self.config.exit_shortlist is not None:
            init.copy_(self.exit_shortlist, torch.arange(self.config.exit_shortlist))

    def set_exit_shortlist(self, ids: Tensor, size: int = 2000) -> None:
        """Choose the words that "shortlist" signals look at: the most frequent of some captions.

        Args:
            ids: vocabulary ids of the captions, any shape.
            size: words to keep, at least 2.
        """
        self.config.exit_shortlist = min(size, self.config.decoder.vocab_size)
        self.config.check_labels()
        words = frequent_words(ids, size, self.config.decoder.vocab_size)
        self.register_buffer("exit_shortlist", words.to(self.device))

    # --- walking --------------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> DecoderBackbone:
        """How to walk the decoder."""
        return decoder_backbone(self.config.decoder.model_type)

    def features(self, exit_index: int, hidden: Tensor) -> Tensor:
        """What the vocabulary layer of exit `exit_index` (0-based) reads, `[..., F]`."""
        return self._head(exit_index).features(hidden, self._stock_head)

    def exit_logits(self, exit_index: int, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of exit `exit_index` (0-based) from the states after its layer `[..., H]`."""
        return self._head(exit_index)(hidden, self._stock_head)

    def words(self, features: Tensor) -> Tensor:
        """Logits `[..., V]` from what the decoder's own vocabulary layer reads `[..., H]`."""
        return self._stock_head.words(features)

    def vocabulary(self, exit_index: int) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, F]` and bias `[V]` of the vocabulary layer of exit `exit_index` (0-based)."""
        return self._head(exit_index).matrix(self._stock_head)

    def _head(self, exit_index: int) -> WordHead:
        if exit_index == len(self.exit_layers) - 1:
            return LAST
        head, words = self.exit_heads[str(self.exit_layers[exit_index])], self.config.decoder.vocab_size
        if not head.borrows and head.vocabulary.out_features != words:
            raise UsageError(
                f"The exits know {head.vocabulary.out_features} words, the decoder {words}: it was resized without them. "
                "Call resize_token_embeddings of the captioner, not of its decoder.",
                field="vocab_size",
                value=words,
            )
        return head

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
        words = self.config.decoder.vocab_size
        for head in self.exit_heads.values():
            if not head.borrows and head.vocabulary.out_features != words:
                head.vocabulary = self._get_resized_lm_head(head.vocabulary, words, mean_resizing=mean_resizing)
        if self.config.exit_shortlist is not None:
            self.exit_shortlist = self.exit_shortlist[self.exit_shortlist < words]
            self.config.exit_shortlist = len(self.exit_shortlist)
        return embeddings

    @property
    def _stock_head(self) -> StockHead:
        return StockHead(self.backbone, self.decoder)

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
        decoder_exits: Any = None,
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
            decoder_exits: what `generate` carries from token to token.
            decoder_attention_mask, cache, decoder_inputs_embeds, use_cache, return_dict, kwargs: as in the stock model; the
                cache by any name that a release of transformers gave it.

        Raises:
            UsageError: for early exit without a policy, in training, or over a cache whose rows cannot be taken apart.
            DataError: for images that the encoder does not take, and labels that are no captions.
            TrainingError: if no start or padding token is set to make the decoder's inputs from the labels.
        """
        if pixel_values is not None:
            check_images(pixel_values, self, kwargs.get("interpolate_pos_encoding", False))
        if labels is not None:
            labels = read_caption_labels(labels, self.config.decoder, pixel_values, decoder_input_ids)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = decoder_inputs(labels, self)
        cache = given_cache(cache, kwargs)
        run = decoder_exits or ExitRun(self.choose_policy(early_exit, operating_point, kwargs))
        token = decoder_input_ids is not None and decoder_input_ids.shape[1] == 1 and labels is None
        decodes = run.policy is not None and token and _holds_prompt(cache, self.exit_layers[-1]) and takes_apart(cache)
        if run.policy is not None and run.policy.may_leave and not decodes:
            caches = self.config.decoder.use_cache if use_cache is None else use_cache
            _require_prompt(cache, labels, caches, begun=bool(run.exit_layers) or early_exit is True)
        if decodes:
            output = decode(self, decoder_input_ids, decoder_attention_mask, encoder_outputs, cache, run, kwargs)
        else:
            every_exit = decoder_exits is None and (self.training or early_exit is False)
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
                self._ask_every_exit(output, labels, exit_tokens)
                if not hidden_wanted:
                    output.decoder_hidden_states = output.encoder_hidden_states = None
            output.exit_layer = torch.full(output.logits.shape[:2], self.exit_layers[-1], device=output.logits.device)
        if decoder_exits is not None:
            check_finite(output.logits[:, -1], run.image_numbers(len(output.logits)))
        run.note(output.exit_layer[:, -1])
        plain = self.config.return_dict if return_dict is None else return_dict
        return output if plain else output.to_tuple()

    def _ask_every_exit(self, output: EarlyExitCaptionerOutput, labels: Tensor | None, tokens: Tensor | None) -> None:
        """Write what every exit says of every token, or of some, into the output of a full pass."""

        def chosen(states: Tensor) -> Tensor:
            return states if tokens is None else states[tokens]

        states = [chosen(output.decoder_hidden_states[layer]) for layer in self.exit_layers[:-1]]
        early = [self.exit_logits(index, state) for index, state in enumerate(states)]
        output.exit_logits = torch.stack([*early, chosen(output.logits)], -2)  # [B, T, E, V]
        if self.exit_gates:
            gates = zip(self.exit_layers, states, strict=False)
            leave_logits = torch.stack([self.exit_gates[str(layer)](state, None) for layer, state in gates], -1)
            output.exit_scalars = {"gate": leave_logits}
        if self.training and labels is not None:
            given = chosen(labels).flatten()
            logits = output.exit_logits.reshape(len(given), *output.exit_logits.shape[-2:])
            output.loss = WeightedObjective()(logits, given, SINGLE_LABEL, self.exit_layers).loss

    def prepare_decoder_input_ids_from_labels(self, labels: Any) -> Tensor:
        """What the decoder reads to write captions `[B, T]`: the start token, then all tokens but the last.

        Raises:
            DataError: for labels that are no captions, naming row and token.
            TrainingError: if no start or padding token is set.
        """
        return decoder_inputs(read_caption_labels(labels, self.config.decoder), self)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        early_exit: bool | None = None,
        operating_point: str | None = None,
        return_exit_layers: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: greedy, beam search or sampling; with a policy, tokens leave where they are decided.

        Args:
            inputs: images `[B, 3, H, W]`.
            early_exit: `None` exits early if a policy is set and the model is not training; `False` runs every layer;
                `True` insists on early exit.
            operating_point: name of the policy to use in place of `exit_policy`; "exact" runs the full model.
            return_exit_layers: give a dict-like output, whose `exit_layers` says, in the shape of `sequences`, which layer
                each token left after (1 to L); 0 for the prompt and for padding.
            generation_config, args, kwargs: as in transformers.

        Raises:
            UsageError: for early exit without a policy or in training, without a cache, over a cache whose rows cannot be
                taken apart, or with an assistant.
            DataError: for images that the encoder does not take, tokens that generation needs and nobody set, or an answer
                that is not finite, naming the image.
        """
        bound = signature(VisionEncoderDecoderModel.generate).bind(self, inputs, generation_config, *args)
        options = {**dict(list(bound.arguments.items())[2:]), **kwargs}  # all but self and inputs
        cache = given_cache(None, options)
        if cache is not None:
            options[cache_name(VisionEncoderDecoderModel.forward)] = cache
        if return_exit_layers:
            options["return_dict_in_generate"] = True
        settings = generation_settings(self, options)
        states = {flag: True for flag in ("output_hidden_states", "output_attentions") if getattr(settings, flag)}
        policy = self.choose_policy(early_exit, operating_point, states)
        images = options.get("pixel_values") if inputs is None else inputs
        if images is not None or options.get("encoder_outputs") is None:
            check_images(images, self, options.get("interpolate_pos_encoding", False))
        check_generation(settings, options, policy is not None and policy.may_leave, return_exit_layers)
        run = ExitRun(policy, len(options["encoder_outputs"][0] if images is None else images))
        output = super().generate(inputs, **run.watching(options, settings), decoder_exits=run)
        if return_exit_layers:
            output["exit_layers"] = exit_layers_of(output, run)
        return output

    def _get_stopping_criteria(self, generation_config: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, **kwargs)
        return EndWatch(criteria, stopping_criteria.run) if isinstance(stopping_criteria, EndWatch) else criteria


def _in_full(why: str) -> UsageError:
    return UsageError(
        f"No token can leave early here: {why}. Tokens leave where they are decoded one by one over a cache that holds the "
        "prompt, as `generate` does it; pass early_exit=False to run in full.",
        field="early_exit",
    )


def _require_prompt(cache: Any, labels: Any, caches: bool, begun: bool) -> None:
    """Refuse passes that run in full although a policy lets tokens leave; only the prompt's may, before any token's.

    Args:
        cache: of the call, or `None`.
        labels: of the call, or `None`.
        caches: whether the pass leaves a cache to go on with.
        begun: whether the prompt is over, or may not be what comes.
    """
    if labels is not None:
        raise _in_full("labels are compared with a whole caption")
    if not caches:
        raise _in_full("use_cache is False")
    if cache is not None and cache.get_seq_length() > 0:
        require_dynamic(cache)
        raise _in_full("several tokens at once go on from a cache, or one whose images are missing")
    if begun:
        raise _in_full("there is no cache that holds a prompt")


def _holds_prompt(cache: Any, layers: int) -> bool:
    """Whether a prompt has run through every layer, cross attention included."""
    if cache is None or cache.get_seq_length() == 0:
        return False
    updated = getattr(cache, "is_updated", {})
    return all(updated.get(layer) for layer in range(layers))

"""Language models whose tokens leave at the layer where they are decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..errors import UsageError
from ..families.decoders import DECODERS, DecoderBackbone, cache_name, given_cache
from ..modeling.outputs import EarlyExitCausalLMOutput
from .decoding import ExitRun, decode
from .prompts import left_padded, read_prompts
from .token_exits import ModelThatWrites


class EarlyExitLanguageModel(ModelThatWrites):
    """Put before a stock causal language model, it gives it exits.

    The class loads any plain checkpoint of its family and, run in full, generates what the stock class does; the stock class
    reads the folders it saves. With a policy `generate` runs, for each row and token, only the layers that the token needs:
    layers above get its keys and values from the state it left with. The prompt, and with it the first token, always runs in
    full.

    Examples:
        >>> import hf_earlyexit as ee
        >>> config = ee.EarlyExitGPT2LMConfig(vocab_size=50, n_embd=32, n_layer=4, n_head=2)
        >>> ee.EarlyExitGPT2LMHeadModel(config).exit_layers
        (1, 2, 3, 4)
    """

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config = self.config_class.from_stock(config)
        config.check_exits()  # values given to from_pretrained were set after the config checked itself
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.add_exits()
        self.post_init()

    @property
    def backbone(self) -> DecoderBackbone:  # type: ignore[override]
        """How to walk the layers."""
        return DECODERS[self.config.stock_model_type]

    @property
    def token_decoder(self) -> Any:
        """The stock model with its head: this one."""
        return self

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers, for the model and the vocabulary layers of its exits alike.

        Thresholds that were calibrated before are no longer vouched for. A shortlist stays, but for words that are gone.

        Args:
            new_num_tokens, pad_to_multiple_of, mean_resizing: as in transformers.

        Returns:
            The model's embeddings.
        """
        embeddings: nn.Embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)  # type: ignore[misc]
        self.resize_exits(mean_resizing)
        return embeddings

    def read_prompts(self, rows: Any, tokenizer: Any, image_processor: Any, batch_size: int) -> list[list[int]]:
        if image_processor is not None:
            raise UsageError("A language model reads no pictures; leave image_processor out.", field="image_processor")
        return read_prompts(rows, tokenizer, self.config.vocab_size)

    def prompt_inputs(self, prompts: Sequence[Any]) -> dict[str, Any]:
        return left_padded(prompts, self.device)

    def full_pass(self, inputs: dict[str, Any], ids: Tensor, start: int) -> tuple[list[Tensor], Tensor]:
        prompt = inputs["attention_mask"]
        mask = functional.pad(prompt, (0, ids.shape[1] - prompt.shape[1]), value=1)
        output = self(
            ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            token_exits=ExitRun(None),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=ids.shape[1] - start,
        )
        return [states[:, start:] for states in output.hidden_states], output.logits

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
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

        Tokens leave early where they are decoded one at a time over a cache, as `generate` does it; a text that is given
        whole runs in full.

        Args:
            input_ids: `[B, T]`; or `inputs_embeds` `[B, T, H]`.
            attention_mask: `[B, T]`, 0 at padding.
            labels: `[B, T]`, as the stock model takes them: the ids themselves, -100 where nothing is learned. In training
                the loss is the mean over all exits weighted by depth.
            early_exit, operating_point: as in `generate`.
            exit_tokens: booleans `[B, T]` with N true: where every exit answers, only these tokens get `exit_logits`
                `[N, E, V]` and `exit_scalars` `[N, E - 1]`; that saves memory in training.
            asked_exits: numbers (0-based) of the exits that answer, ascending, the last among them, where not all need to.
            token_exits: what `generate` carries from token to token.
            position_ids, cache, inputs_embeds, use_cache, return_dict, kwargs: as in the stock model; the cache by any name
                that a release of transformers gave it.

        Raises:
            UsageError: for early exit without a policy, in training, or over a cache whose rows cannot be taken apart.
        """
        cache = given_cache(cache, kwargs)
        run, decodes = self.run_of(input_ids, labels, cache, use_cache, early_exit, operating_point, token_exits, kwargs)
        stock = super().forward  # type: ignore[misc]
        if decodes:
            given = {"position_ids": position_ids, **kwargs}
            logits, exit_layer = decode(self, input_ids, attention_mask, None, cache, run, given)  # type: ignore[arg-type]
            output = EarlyExitCausalLMOutput(
                logits=logits, exit_layer=exit_layer, **{cache_name(EarlyExitCausalLMOutput): cache}
            )
        else:
            every_exit = token_exits is None and (self.training or early_exit is False)
            hidden_wanted = kwargs.pop("output_hidden_states", None)
            if hidden_wanted is None:
                hidden_wanted = self.config.output_hidden_states
            if every_exit and not _all_logits(kwargs):
                raise UsageError(
                    "logits_to_keep leaves out tokens that every exit is to answer for; leave it out, and use exit_tokens.",
                    field="logits_to_keep",
                )
            output = EarlyExitCausalLMOutput(
                **stock(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    inputs_embeds=inputs_embeds,
                    labels=labels,
                    use_cache=use_cache,
                    return_dict=True,
                    output_hidden_states=every_exit or hidden_wanted,
                    **{cache_name(stock): cache},
                    **kwargs,
                )
            )
            if every_exit:
                following = None if labels is None else functional.pad(labels, (0, 1), value=-100)[:, 1:]
                self.ask_every_exit(output, output.hidden_states, following, exit_tokens, asked_exits)
                if not hidden_wanted:
                    output.hidden_states = None
        return self.handed_back(output, run, token_exits is not None, return_dict)


def _all_logits(options: dict[str, Any]) -> bool:
    keep = options.get("logits_to_keep", 0)
    return isinstance(keep, int) and keep == 0

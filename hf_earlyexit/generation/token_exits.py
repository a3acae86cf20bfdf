"""What every model that writes has: exits whose heads know the vocabulary, and `generate` where tokens leave early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers import initialization as init

from ..errors import UsageError
from ..families.decoders import DecoderBackbone, cache_name, given_cache
from ..losses import WeightedObjective
from ..modeling.exits import ModelWithExits
from ..modeling.finite import check_finite
from ..modeling.gates import new_gates
from ..problem_types import SINGLE_LABEL
from ..values import check_flags
from .checks import LOSSLESS, check_generation, check_lossless, check_prompts, generation_settings
from .decoding import EndWatch, ExitRun, GivenCriteria, exit_layers_of
from .lossless import decode_lossless
from .token_cache import holds_prompt, require_prompt, takes_apart
from .word_heads import LAST, Shift, StockHead, WordHead, frequent_words, new_word_head


class ModelThatWrites(ModelWithExits):
    """Put before a stock class that generates; `token_decoder` is the part whose layers have the exits."""

    backbone: DecoderBackbone
    token_decoder: Any
    exit_shortlist: Tensor
    crosses = False  # whether its layers look at an encoder's states

    accepts_loss_kwargs = False  # the loss is a mean over the batch; Trainer divides it when it accumulates

    def add_exits(self) -> None:
        """Make the heads, gates and shortlist that the config asks for."""
        config, words = self.config, self.config.word_config
        self.exit_heads = nn.ModuleDict(
            {str(layer): new_word_head(config.exit_head, words, config.exit_rank) for layer in config.exit_layers[:-1]}
        )
        self.exit_gates = new_gates(config, words.hidden_size, words.vocab_size)
        if config.exit_shortlist is not None:
            self.register_buffer("exit_shortlist", torch.arange(config.exit_shortlist))  # type: ignore[attr-defined]

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, Shift):
            init.zeros_(module.weight)
        elif module is self and self.config.exit_shortlist is not None:
            init.copy_(self.exit_shortlist, torch.arange(self.config.exit_shortlist))

    def set_exit_shortlist(self, ids: Tensor, size: int = 2000) -> None:
        """Choose the words that "shortlist" signals look at: the most frequent of some texts.

        Args:
            ids: vocabulary ids of the texts, any shape.
            size: words to keep, at least 2.
        """
        most = self.config.word_config.vocab_size
        self.config.exit_shortlist = min(size, most)
        self.config.check_labels()
        words = frequent_words(ids, size, most)
        self.register_buffer("exit_shortlist", words.to(self.device))  # type: ignore[attr-defined]

    # --- heads ----------------------------------------------------------------------------------------------------

    def features(self, exit_index: int, hidden: Tensor) -> Tensor:
        """What the vocabulary layer of exit `exit_index` (0-based) reads, `[..., F]`."""
        return self._head(exit_index).features(hidden, self._stock_head)

    def exit_logits(self, exit_index: int, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of exit `exit_index` (0-based) from the states after its layer `[..., H]`."""
        logits: Tensor = self._head(exit_index)(hidden, self._stock_head)
        return logits

    def gate_states(self, hidden: Tensor) -> Tensor:
        """What gates look at, `[..., H]`: states as the decoder's own vocabulary layer reads them, behind its last norm.

        Paper: so does the released code of ConsistentEE for decoders; sizes of raw states differ by orders of magnitude.
        """
        return self._stock_head.features(hidden)

    def words(self, features: Tensor) -> Tensor:
        """Logits `[..., V]` from what the decoder's own vocabulary layer reads `[..., H]`."""
        return self._stock_head.words(features)

    def vocabulary(self, exit_index: int) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, F]` and bias `[V]` of the vocabulary layer of exit `exit_index` (0-based)."""
        return self._head(exit_index).matrix(self._stock_head)

    def _head(self, exit_index: int) -> WordHead:
        if exit_index == len(self.exit_layers) - 1:
            return LAST
        head: Any = self.exit_heads[str(self.exit_layers[exit_index])]
        words = self.config.word_config.vocab_size
        if not head.borrows and head.vocabulary.out_features != words:
            raise UsageError(
                f"The exits know {head.vocabulary.out_features} words, the decoder {words}: it was resized without them. "
                "Call resize_token_embeddings of the model with exits, not of its decoder.",
                field="vocab_size",
                value=words,
            )
        return head  # type: ignore[no-any-return]

    @property
    def _stock_head(self) -> StockHead:
        return StockHead(self.backbone, self.token_decoder)

    def resize_exits(self, mean_resizing: bool) -> None:
        """Give the exits' own vocabulary layers the decoder's size; a shortlist stays, but for words that are gone."""
        words = self.config.word_config.vocab_size
        head: Any
        for head in self.exit_heads.values():
            if not head.borrows and head.vocabulary.out_features != words:
                head.vocabulary = self._get_resized_lm_head(  # type: ignore[attr-defined]
                    head.vocabulary, words, mean_resizing=mean_resizing
                )
        if self.config.exit_shortlist is not None:
            self.exit_shortlist = self.exit_shortlist[self.exit_shortlist < words]
            self.config.exit_shortlist = len(self.exit_shortlist)

    # --- what it is asked to write ---------------------------------------------------------------------------------

    def read_prompts(self, rows: Any, tokenizer: Any, image_processor: Any, batch_size: int) -> Sequence[Any]:
        """What the model writes after, one for each row, as `prompt_inputs` takes it: token ids, or an image's states.

        Args:
            rows: in any form that calibration takes.
            tokenizer, image_processor: the model's, or `None`.
            batch_size: images that are encoded together.
        """
        raise NotImplementedError

    def prompt_inputs(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What `generate` takes of the prompts of one batch."""
        raise NotImplementedError

    def full_pass(self, inputs: dict[str, Any], ids: Tensor, start: int) -> tuple[list[Tensor], Tensor]:
        """States before and after every layer, `[B, T - start, H]` each, and logits of whole texts, all layers run.

        Args:
            inputs: from `prompt_inputs`.
            ids: of the texts with their prompts `[B, T]`.
            start: the first column that is wanted.
        """
        raise NotImplementedError

    def read_images(self, states: Tensor, cache: Any) -> None:
        """Give an empty cache what every layer's cross attention makes of the encoder's states, as a first pass would.

        Args:
            states: `[B, S, width]`, as the encoder gives them.
            cache: an `EncoderDecoderCache` that holds nothing.
        """
        raise NotImplementedError

    def check_tokens(self, settings: GenerationConfig, options: Mapping[str, Any]) -> None:
        """Refuse generation without tokens that it needs.

        Args:
            settings: from `generation_settings`.
            options: arguments of the call by name.
        """

    # --- passes ---------------------------------------------------------------------------------------------------

    def ask_every_exit(
        self,
        output: Any,
        states: Any,
        labels: Tensor | None,
        tokens: Tensor | None,
        exits: Sequence[int] | None = None,
    ) -> None:
        """Write what every exit, or some, says of every token, or of some, into the output of a full pass.

        Args:
            output: with `logits` `[B, T, V]`.
            states: after every layer, `[B, T, H]` each, those before the first layer in front.
            labels: what each token is to be followed by `[B, T]`, -100 where nothing is learned; or `None`.
            tokens: booleans `[B, T]`, or `None` for all.
            exits: numbers (0-based) of the exits that answer, ascending, the last among them; `None` for all.

        Raises:
            UsageError: for other numbers.
        """
        asked = list(range(len(self.exit_layers)) if exits is None else exits)
        if asked != sorted({*asked} & {*range(len(self.exit_layers))}) or asked[-1:] != [len(self.exit_layers) - 1]:
            raise UsageError(
                f"asked_exits is {exits!r}; expected numbers from 0 to {len(self.exit_layers) - 1}, ascending, the last "
                "among them.",
                field="asked_exits",
                value=exits,
            )

        def chosen(values: Tensor) -> Tensor:
            return values if tokens is None else values[tokens]

        early = {index: chosen(states[self.exit_layers[index]]) for index in asked[:-1]}
        logits = [self.exit_logits(index, state) for index, state in early.items()]
        output.exit_logits = torch.stack([*logits, chosen(output.logits)], -2)  # [B, T, E, V]
        if self.exit_gates and early:
            gates = [self.exit_gates[str(self.exit_layers[index])] for index in early]
            leave_logits = [gate(self.gate_states(state), None) for gate, state in zip(gates, early.values(), strict=True)]
            output.exit_scalars = {"gate": torch.stack(leave_logits, -1)}
        if self.training and labels is not None:
            wanted = chosen(labels).flatten()
            flat = output.exit_logits.reshape(len(wanted), *output.exit_logits.shape[-2:])
            output.loss = WeightedObjective()(flat, wanted, SINGLE_LABEL, self.exit_layers, taught=asked).loss

    def run_of(
        self,
        ids: Tensor | None,
        labels: Tensor | None,
        cache: Any,
        use_cache: bool | None,
        early_exit: bool | None,
        operating_point: str | None,
        token_exits: ExitRun | None,
        options: dict[str, Any],
    ) -> tuple[ExitRun, bool]:
        """What a pass belongs to, and whether it decodes one token of each row and rows may leave.

        Args:
            ids: that the decoder reads `[B, T]`, or `None`.
            labels, cache, use_cache, early_exit, operating_point, token_exits, options: of the pass.

        Raises:
            UsageError: for a pass that runs in full although a policy lets tokens leave.
        """
        run = token_exits or ExitRun(self.choose_policy(early_exit, operating_point, options))
        decodes = run.policy is not None and ids is not None and ids.shape[1] == 1 and labels is None
        decodes = decodes and holds_prompt(cache, self.exit_layers[-1]) and takes_apart(cache, self.crosses)
        if run.policy is not None and run.policy.may_leave and not decodes:
            caches = self.config.word_config.use_cache if use_cache is None else use_cache
            require_prompt(cache, labels, caches, begun=bool(run.exit_layers) or early_exit is True, crosses=self.crosses)
        return run, decodes

    def handed_back(self, output: Any, run: ExitRun, writing: bool, return_dict: bool | None) -> Any:
        """The output of a pass, with the layer of every token, which the run notes.

        Args:
            output: what was computed; without exit layers where all layers ran.
            run: of the text.
            writing: whether `generate` asked, which says no word that is not finite.
            return_dict: as in the stock model.

        Raises:
            DataError: naming the row whose logits are not finite.
        """
        if output.exit_layer is None:
            output.exit_layer = torch.full(output.logits.shape[:2], self.exit_layers[-1], device=output.logits.device)
        if writing:
            check_finite(output.logits[:, -1], run.image_numbers(len(output.logits)))
        run.note(output.exit_layer[:, -1])
        plain = self.config.return_dict if return_dict is None else return_dict
        return output if plain else output.to_tuple()

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args: Any,
        early_exit: bool | None = None,
        operating_point: str | None = None,
        return_exit_layers: bool = False,
        lossless: bool = False,
        max_drafts: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: greedy, beam search or sampling; with a policy, tokens leave where they are decided.

        With `lossless=True` the text is the full model's own: a token that leaves is a draft, which the layers above check,
        together with others that wait, before it is final. Greedy search gives the same ids, but for ties that rounding
        decides; sampling the same distribution.

        Args:
            inputs: token ids of the prompts `[B, T]`, or images `[B, 3, H, W]` of a captioner.
            early_exit: `None` exits early if a policy is set and the model is not training; `False` runs every layer;
                `True` insists on early exit.
            operating_point: name of the policy to use in place of `exit_policy`; "exact" runs the full model. Lossless runs
                use "lossless" by default, where the model has it: `DraftCalibration.serve` keeps it there.
            return_exit_layers: give a dict-like output, whose `exit_layers` says, in the shape of `sequences`, which layer
                each token left after (1 to L); 0 for the prompt and for padding. In lossless runs it is the layer that
                drafted the token, L where the last layer wrote it, and `draft_counts` tells what was run (`DraftCounts`).
            lossless: check what early exits say. Scores of rows that have ended are zeros, as is their part of the cache.
            max_drafts: drafts of a row that may wait, in lossless runs; by default `config.exit_drafts`.
            generation_config, args, kwargs: as in transformers.

        Raises:
            UsageError: for early exit without a policy or in training, without a cache, over a cache whose rows cannot be
                taken apart, or with an assistant; for beams in lossless runs.
            DataError: for images that the encoder does not take, tokens that generation needs and nobody set, or an answer
                that is not finite, naming the row.
        """
        check_flags(early_exit=early_exit, return_exit_layers=return_exit_layers, lossless=lossless)
        bound = signature(GenerationMixin.generate).bind(self, inputs, generation_config, *args)
        options = {**dict(list(bound.arguments.items())[2:]), **kwargs}  # all but self and inputs
        cache = given_cache(None, options)
        if cache is not None:
            options[cache_name(super().forward)] = cache  # type: ignore[misc]
        if return_exit_layers:
            options["return_dict_in_generate"] = True
        settings = generation_settings(self, options)  # type: ignore[arg-type]
        states = {flag: True for flag in ("output_hidden_states", "output_attentions") if getattr(settings, flag)}
        point = self.point_of(operating_point, lossless and early_exit is not False)
        policy = self.choose_policy(early_exit, point, states)
        count = self.check_inputs(inputs, settings, options)
        check_generation(settings, options, policy is not None and policy.may_leave, return_exit_layers)
        run = ExitRun(policy, count)
        if lossless:
            most = self.config.exit_drafts if max_drafts is None else max_drafts
            check_lossless(policy, settings, most)
            streamer = options.get("streamer")
            options["stopping_criteria"] = GivenCriteria(options.get("stopping_criteria") or (), options.get("tokenizer"))
            loop = partial(decode_lossless, draft_run=run, most_drafts=most, draft_streamer=streamer)
            output = super().generate(inputs, **options, custom_generate=loop)  # type: ignore[misc]
        else:
            output = super().generate(inputs, **run.watching(options, settings), token_exits=run)  # type: ignore[misc]
        if return_exit_layers:
            output["exit_layers"] = exit_layers_of(output, run)
            if lossless:
                output["draft_counts"] = run.draft_counts
        return output

    def point_of(self, operating_point: str | None, lossless: bool) -> str | None:
        """The operating point of a call of `generate`: the one that drafts were chosen for, where no other is named."""
        if operating_point is None and lossless and LOSSLESS in self.operating_points:
            return LOSSLESS
        return operating_point

    def check_inputs(self, inputs: Any, settings: GenerationConfig, options: dict[str, Any]) -> int:
        """Refuse inputs of `generate` that the model cannot read; says how many images or prompts there are."""
        ids = options.get("input_ids") if inputs is None else inputs
        if ids is not None and options.get("inputs_embeds") is None:
            check_prompts(ids, self.config.word_config.vocab_size)
        return next((len(rows) for rows in (ids, options.get("inputs_embeds")) if rows is not None), 1)

    def _get_stopping_criteria(self, generation_config: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
        if isinstance(stopping_criteria, GivenCriteria):
            kwargs["tokenizer"] = stopping_criteria.tokenizer
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, **kwargs)  # type: ignore[misc]
        return EndWatch(criteria, stopping_criteria.run) if isinstance(stopping_criteria, EndWatch) else criteria

"""The mixin that gives a stock classifier its exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..errors import DataError
from ..families.base import IMAGE, Family
from ..families.context import Context, Part, filled
from ..families.packed import Packed
from ..families.prepared import Layer, prepared
from ..labels import read_labels
from ..losses import WeightedObjective, task_loss
from ..policies import ExitPolicy
from ..signals import SIGNALS, ExitPoint, ExitSignal, scalars_of
from ..walking.loop import run_all, run_early
from ..walking.step import Walks
from .exits import ModelWithExits
from .gates import new_gates
from .heads import HEADS
from .outputs import EarlyExitClassifierOutput, early_output, full_output

UNREAD = {"use_cache", "output_hidden_states", "output_attentions"}  # nothing to layers that exit early


class EarlyExitClassifier(Walks, ModelWithExits):
    """Put before a stock sequence classifier, adds exits to it.

    The last exit is the stock head; `exit_heads` and `exit_gates` hold only what is new. A door fills in `family`.
    """

    family: ClassVar[Family]
    pads = True  # rows of a full pass, as the stock model does; False where its answers are not to be had anyway
    layer_dtype: torch.dtype | None = None  # of a copy whose layers compute in another one than all else, float32
    num_labels: int
    accepts_loss_kwargs = False  # the loss is a mean over the batch; Trainer divides it when it accumulates

    def __init__(self, config: Any) -> None:
        config = self.config_class.from_stock(config)
        config.check_exits()  # values given to from_pretrained were set after the config checked itself
        super().__init__(config)  # type: ignore[call-arg]
        dropout = self.family.dropout_of(config)
        head = HEADS.get(config.exit_head)
        self.exit_heads = nn.ModuleDict(
            {str(layer): head(config.hidden_size, config.num_labels, dropout) for layer in config.exit_layers[:-1]}
        )
        self.exit_gates = new_gates(config, config.hidden_size, config.num_labels)
        self.post_init()

    # --- walking --------------------------------------------------------------------------------------------------

    def run_layer(self, layer: int, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after layer `layer` (1-based)."""
        module = self.family.layers_of(self.base_model)[layer - 1]
        if isinstance(context, Packed):
            return self.family.packed_layer(module)(hidden, context)
        return self.family.call(module, hidden, context)

    def exit_signal(
        self, exit_index: int, hidden: Tensor, context: Context, asks: Sequence[str] = (), before: Tensor | None = None
    ) -> ExitSignal:
        """What exit `exit_index` (0-based) tells of the hidden states after its layer: see `Walker`."""
        exit_layers, least = self.config.exit_layers, context.least_rows
        rows = context.count(hidden) if least else None
        pooled = gate = None
        if exit_index == len(exit_layers) - 1:
            one_token = self.family.reads_one_token(self.config)
            parts = self._parts(hidden, context, one_token)
            logits = _of_rows(parts, least, partial(self.family.answer, self))
        else:
            layer = str(exit_layers[exit_index])
            head: Any = self.exit_heads[layer]
            one_token = head.one_token
            parts = self._parts(hidden, context, one_token)
            pooled = _of_rows(parts, least, partial(head.pool, stock_pool=self._stock_pool))
            logits = head(pooled)
            gate = self.exit_gates[layer] if len(self.exit_gates) else None
        if not asks:
            return ExitSignal(_first(logits, rows))
        first = second = None
        if before is not None and any(SIGNALS.get(name).reads_states for name in asks):
            states = (_state(self._read(part, context, one_token), one_token) for part in (before, hidden))
            first, second = (filled(part, least) for part in states)
        scalars = scalars_of(asks, ExitPoint(logits, pooled, first, second, gate))
        return ExitSignal(_first(logits, rows), {name: _first(values, rows) for name, values in scalars.items()})

    def _parts(self, hidden: Tensor, context: Context, one_token: bool) -> list[Part]:
        """What a head reads, behind the stock model's final norm."""
        parts, norm = self._read(hidden, context, one_token), self.family.norm_of(self.base_model)
        return parts if norm is None else [part._replace(hidden=norm(part.hidden)) for part in parts]

    def _read(self, hidden: Tensor, context: Context, one_token: bool) -> list[Part]:
        """The states that an exit looks at, in the dtype of heads."""
        parts = context.for_head(hidden, one_token)
        return parts if self.layer_dtype is None else [part._replace(hidden=part.hidden.float()) for part in parts]

    def _stock_pool(self, hidden: Tensor) -> Tensor:
        assert self.family.pool is not None  # the config refuses heads that borrow one
        return self.family.pool(self, hidden)

    def _may_pack(self, policy: ExitPolicy | None, mask: Tensor | None, options: dict[str, Any]) -> bool:
        """Whether nothing asks for padded rows: neither the inputs, nor the promise that who does not exit early gets the
        stock model's answers to the bit."""
        if self.pads and (policy is None or not policy.may_leave):
            return False
        if any(options.get(name) for name in UNREAD - {"use_cache"}) or options.keys() - UNREAD:
            return False
        return mask is None or (mask.ndim == 2 and len(mask) > 0)

    def _wanted(self, options: dict[str, Any]) -> set[str]:
        """What is asked for beside the answers, of "hidden_states" and "attentions"."""
        names = ("hidden_states", "attentions")
        return {name for name in names if options.get(f"output_{name}", getattr(self.config, f"output_{name}", False))}

    def _show(self, output: Any, wanted: set[str], states: list[Tensor], context: Context) -> None:
        """Add what transformers does not collect by itself."""
        norm = self.family.norm_of(self.base_model)
        if "hidden_states" in wanted and norm is not None and self.family.task != IMAGE:
            last = states[-1] if self.layer_dtype is None else states[-1].float()
            output.last_hidden_state = norm(last)  # no key: transformers puts it at the end of the hidden states
        if not self.family.is_watched:
            shown = {"hidden_states": states, "attentions": context.attentions or []}
            for name in wanted:
                output[name] = tuple(shown[name])

    def _classify(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None,
        early_exit: bool | None,
        operating_point: str | None,
        exit_signals: Sequence[str] | None,
        shadowed: Sequence[int],
        options: dict[str, Any],
    ) -> EarlyExitClassifierOutput:
        """What `forward` does, whatever the inputs are."""
        policy = self.choose_policy(early_exit, operating_point, options)
        asks = self.signals_for(exit_signals, policy)
        if labels is not None:
            labels, problem_type = read_labels(labels, self.config, "the batch")
        walker: Any = self
        if self._may_pack(policy, inputs.get("attention_mask"), options):
            ready = prepared(self.family, self.base_model)
            walker = _PackedWalk(self, ready.layers) if ready.packs else self
        if walker is not self:
            hidden, context = self.family.begin_packed(self.base_model, inputs)
        else:
            hidden, context = self.family.begin(self.base_model, inputs, options)
        states, wanted = [hidden], self._wanted(options)
        if policy is not None:
            early = run_early(walker, hidden, context, policy, self.num_labels, shadowed, self.dtype)
            output = early_output(early, self.config.exit_layers)
        else:
            if not self.family.is_watched and "attentions" in wanted:
                context = replace(context, attentions=[])
            shown = states if wanted else None
            exit_logits, scalars = run_all(walker, hidden, context, self.num_labels, asks, shown, self.dtype)
            output = full_output(exit_logits, scalars, self.config.num_hidden_layers, shadowed)
        if labels is not None:
            if self.training:
                every_exit: Any = output.exit_logits  # all of them run in training
                loss = WeightedObjective()(every_exit, labels, problem_type, self.exit_layers).loss
            else:
                loss = task_loss(output.logits, labels, problem_type)  # type: ignore[arg-type]  # never `None` here
            output = EarlyExitClassifierOutput(loss=loss, **output)  # first in order, as in the stock output
        self._show(output, wanted, states, context)
        return output


class _PackedWalk(Walks):
    """A classifier as it is walked through layers that are ready for packed rows.

    Args:
        model: the classifier.
        layers: ready, in order.
    """

    def __init__(self, model: EarlyExitClassifier, layers: Sequence[Layer]) -> None:
        self.layers, self.exit_layers, self.exit_signal = layers, model.exit_layers, model.exit_signal

    def run_layer(self, layer: int, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after layer `layer` (1-based)."""
        return self.layers[layer - 1](hidden, context)


class EarlyExitTextClassifier(EarlyExitClassifier):
    """Put before a stock sequence classifier, adds exits to it."""

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        early_exit: bool | None = None,
        operating_point: str | None = None,
        exit_signals: Sequence[str] | None = None,
        shadowed: Sequence[int] = (),
        **kwargs: Any,
    ) -> EarlyExitClassifierOutput:
        """Classify a batch; with a policy, each row leaves at the layer where it is decided.

        Args:
            input_ids: `[B, T]`; or `inputs_embeds` `[B, T, H]`.
            attention_mask: `[B, T]`, 0 at padding.
            token_type_ids, position_ids: `[B, T]`, as in the stock model.
            labels: `[B]`, or `[B, C]` for many labels. The loss is that of the answers; in training, the mean over all
                exits weighted by depth.
            early_exit: `None` exits early if a policy is set and the model is not training; `False` runs every exit;
                `True` insists on early exit.
            operating_point: name of the policy to use in place of `exit_policy`; "exact" runs the full model.
            exit_signals: names of the signals that every exit gives beside its logits where all exits run; by default those
                that are learned, such as gates.
            shadowed: positions of n rows that run on to the last layer after they have left; `full_logits` of the output
                holds what the full model answers to them. Nobody's answer changes.
            kwargs: passed to the layers; `output_hidden_states`, `output_attentions` and `return_dict` as usual.

        Raises:
            UsageError: for early exit without a policy, in training, or with hidden states or signals asked for.
            UnknownNameError: for an unknown operating point or signal.
            DataError: for inputs longer than the model takes, labels that cannot be, by row, or a shadowed row that is not
                in the batch.
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            self._require_first_token_heads(attention_mask)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return self._classify(inputs, labels, early_exit, operating_point, exit_signals, shadowed, kwargs)

    def _require_first_token_heads(self, mask: Tensor) -> None:
        """Refuse masks that do not tell real tokens `[B, T]` where exits average these."""
        if averaging := [layer for layer, head in self.exit_heads.items() if not head.one_token]:
            raise DataError(
                f"attention_mask has shape {list(mask.shape)}, which does not tell the exits after the layers "
                f"{', '.join(averaging)} which tokens they average; expected [rows, tokens], 0 at padding.",
                field="attention_mask",
            )


class EarlyExitImageClassifier(EarlyExitClassifier):
    """Put before a stock image classifier, adds exits to it."""

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        early_exit: bool | None = None,
        operating_point: str | None = None,
        exit_signals: Sequence[str] | None = None,
        shadowed: Sequence[int] = (),
        **kwargs: Any,
    ) -> EarlyExitClassifierOutput:
        """Classify a batch of images; with a policy, each leaves at the layer where it is decided.

        Args:
            pixel_values: `[B, channels, height, width]`, from the model's image processor.
            labels, early_exit, operating_point, exit_signals, shadowed, kwargs: as for texts.
            interpolate_pos_encoding: take images of another size, where the family can.

        Raises:
            UsageError: for early exit without a policy, in training, or with hidden states or signals asked for.
            UnknownNameError: for an unknown operating point or signal.
            DataError: for images of another size or number of channels.
        """
        inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        return self._classify(inputs, labels, early_exit, operating_point, exit_signals, shadowed, kwargs)


def _state(parts: list[Part], one_token: bool) -> Tensor:
    """One state a row `[B, H]`: of the token that answers, or the mean of the real tokens."""
    return _joined([part.hidden[:, 0] if one_token else part.mean for part in parts])


def _of_rows(parts: list[Part], least: int, call: Callable[[Part], Tensor]) -> Tensor:
    """What a call gives for all rows of some parts, given at least so many rows at once; as many come back."""
    if len(parts) == 1:
        return call(parts[0].filled(least))
    return filled(torch.cat([call(part.filled(least))[: part.hidden.shape[0]] for part in parts]), least)


def _first(values: Tensor, rows: int | None) -> Tensor:
    """The first rows; all as they are for `None`, and no size is read."""
    return values if rows is None or rows == values.shape[0] else values[:rows]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

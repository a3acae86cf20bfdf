"""The mixin that gives a stock classifier its exits."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..backbones.base import Backbone, Context
from ..errors import CheckpointError, DataError, UsageError
from ..files import replaced_folder
from ..losses import WeightedObjective, task_loss
from ..policies import ExitPolicy, ExitSignal
from ..problems import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from .certificate import check_certificates, drop_outdated
from .configuration import FORMAT_VERSION
from .gates import GATES
from .heads import HEADS
from .loading import check_tensors
from .operating import OperatingPoints
from .outputs import EarlyExitClassifierOutput
from .shim import LoadedByShim


class EarlyExitClassifier(OperatingPoints, LoadedByShim):
    """Put before a stock sequence classifier, adds exits to it.

    The last exit is the stock head; `exit_heads` and `exit_gates` hold only what is new. A door fills in `backbone` and
    `classify`.
    """

    backbone: ClassVar[Backbone]
    accepts_loss_kwargs = False  # the loss is a mean over the batch; Trainer divides it when it accumulates

    def __init__(self, config: Any) -> None:
        config.check_exits()  # values given to from_pretrained were set after the config checked itself
        super().__init__(config)
        dropout = config.classifier_dropout if config.classifier_dropout is not None else config.hidden_dropout_prob
        head = HEADS.get(config.exit_head)
        self.exit_heads = nn.ModuleDict(
            {str(layer): head(config.hidden_size, config.num_labels, dropout) for layer in config.exit_layers[:-1]}
        )
        self.exit_gates = nn.ModuleDict()
        if config.exit_gate is not None:
            gate = GATES.get(config.exit_gate)
            for layer in config.exit_layers[:-1]:
                self.exit_gates[str(layer)] = gate(config.hidden_size, config.num_labels)
        self.post_init()

    def classify(self, hidden: Tensor) -> Tensor:
        """The stock model's logits `[B, C]` from the hidden states of its last layer `[B, T, H]`."""
        raise NotImplementedError

    # --- walking --------------------------------------------------------------------------------------------------

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers (1-based) after which rows may leave, the last one included."""
        return tuple(self.config.exit_layers)

    def run_layer(self, layer: int, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after layer `layer` (1-based)."""
        return self.backbone.step(self.backbone.layers(self.base_model)[layer - 1], hidden, context)

    def exit_signal(self, exit_index: int, hidden: Tensor, context: Context, with_gate: bool = False) -> ExitSignal:
        """What exit `exit_index` (0-based) says of the hidden states after its layer, its gate where there is one."""
        layer = self.config.exit_layers[exit_index]
        if layer == self.config.num_hidden_layers:
            return ExitSignal(self.classify(hidden))
        head = self.exit_heads[str(layer)]
        state = head.pool(hidden, context.tokens, self._stock_pool)
        logits = head(state)
        with_gate = with_gate and str(layer) in self.exit_gates
        return ExitSignal(logits, self.exit_gates[str(layer)](state, logits) if with_gate else None)

    def _stock_pool(self, hidden: Tensor) -> Tensor:
        return self.backbone.pool(self.base_model, hidden)

    @merge_with_config_defaults
    @capture_outputs
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
            kwargs: passed to the layers; `output_hidden_states`, `output_attentions` and `return_dict` as usual.

        Raises:
            UsageError: for early exit without a policy, in training, or with hidden states asked for.
            UnknownNameError: for an unknown operating point.
            DataError: for inputs longer than the model takes.
        """
        from ..inference.engine import run_all, run_early

        policy = self._choose_policy(early_exit, operating_point, kwargs)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        hidden, context = self.backbone.begin(self.base_model, inputs, kwargs)
        if policy is not None:
            early = run_early(self, hidden, context, policy, self.num_labels)
            layers = torch.tensor(self.config.exit_layers, device=hidden.device)
            output = EarlyExitClassifierOutput(
                logits=early.logits, exit_layer=layers[early.exit_index], exit_score=early.score
            )
        else:
            exit_logits, gates = run_all(self, hidden, context, self.num_labels)
            depth = torch.full(hidden.shape[:1], self.config.num_hidden_layers, device=hidden.device)
            output = EarlyExitClassifierOutput(
                logits=exit_logits[:, -1], exit_logits=exit_logits, exit_gates=gates, exit_layer=depth
            )
        if labels is not None:
            problem_type = label_problem_type(self.config, labels)
            if self.training:
                loss = WeightedObjective()(output.exit_logits, labels, problem_type, self.exit_layers).loss
            else:
                loss = task_loss(output.logits, labels, problem_type)
            output = EarlyExitClassifierOutput(loss=loss, **output)  # first in order, as in the stock output
        return output

    def _choose_policy(
        self, early_exit: bool | None, operating_point: str | None, kwargs: dict[str, Any]
    ) -> ExitPolicy | None:
        policy = self.policy_at(operating_point)
        if operating_point is not None:
            if early_exit is not None and early_exit != (policy is not None):
                raise UsageError(
                    f"early_exit={early_exit} contradicts operating_point={operating_point!r}; give one of the two.",
                    field="operating_point",
                    value=operating_point,
                )
            early_exit = policy is not None
        if early_exit is False or (early_exit is None and (self.training or policy is None)):
            return None
        if policy is None:
            raise UsageError(
                "early_exit=True, but no policy is set; calibrate first and call `model.set_exit_policy(result.policy)`.",
                field="early_exit",
            )
        if self.training:
            raise UsageError("Early exit asked for in training mode, which needs every exit. Call model.eval() first.")
        for flag in ("output_hidden_states", "output_attentions"):
            if kwargs.get(flag, getattr(self.config, flag, False)):
                raise UsageError(
                    f"{flag} with early exit would give tensors of a different batch at every layer; pass early_exit=False.",
                    field=flag,
                )
        return policy

    # --- saving and loading ---------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers, but the folder is replaced whole or not at all.

        After an error it is as it was. A policy whose heads have been trained since it was calibrated is left out. With
        `distributed_checkpoint` every process writes its own part, straight into the folder.

        Args:
            save_directory, is_main_process, state_dict, push_to_hub, kwargs: as in transformers.

        Raises:
            CheckpointError: if the folder cannot be written.
        """
        self.config.early_exit_version = FORMAT_VERSION
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        drop_outdated(self, state_dict)
        with replaced_folder(save_directory, needs=self.get_memory_footprint()) as new:
            super().save_pretrained(new, state_dict=state_dict and dict(state_dict), **kwargs)  # it empties what it is given
        if push_to_hub:
            with TemporaryDirectory() as copy:  # the client uploads whatever it finds changed in a folder
                named = {"repo_id": Path(save_directory).name, **kwargs}
                super().save_pretrained(copy, state_dict=state_dict, push_to_hub=True, **named)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a model with exits, or a plain checkpoint of the family, whose exits are then new.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            args, kwargs: as in transformers, and `init_missing_exits=True` to accept a checkpoint with exits whose
                exits differ from the config's: missing ones are initialised, others dropped. For training only.
                `ignore_certificate=True` leaves out policies that were calibrated on other exit heads.

        Raises:
            CheckpointError: if tensors are missing, of another shape, not finite, not those that the thresholds were chosen
                on, or the file is damaged.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        init_missing = kwargs.pop("init_missing_exits", False)
        ignore_certificate = kwargs.pop("ignore_certificate", False)
        any_size = kwargs.pop("ignore_mismatched_sizes", False)
        path = pretrained_model_name_or_path
        try:
            model, info = super().from_pretrained(
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights in {path} cannot be read ({error}); the file is cut short or damaged. Download it again.",
                path=path,
            ) from error
        check_tensors(model, info, path, init_missing, any_size)
        check_certificates(model, path, drop_uncertified=ignore_certificate or init_missing)
        return (model, info) if wants_info else model


def label_problem_type(config: Any, labels: Tensor) -> str:
    """What these labels mean, by the stock model's conventions, without writing it into the config.

    Raises:
        DataError: for class labels where the model has one output and no `problem_type`.
    """
    if config.problem_type is not None:
        return config.problem_type
    whole = not labels.is_floating_point()
    if config.num_labels == 1:
        if whole:
            raise DataError(
                "Whole-number labels for a model with one output: set num_labels to the number of classes, or "
                "problem_type='regression' if they are values.",
                field="labels",
            )
        return REGRESSION
    return SINGLE_LABEL if whole else MULTI_LABEL

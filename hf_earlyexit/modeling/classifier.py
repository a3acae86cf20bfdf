"""The mixin that gives a stock classifier its exits."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..backbones.base import Backbone, Context
from ..calibration.result import CalibrationResult
from ..errors import CheckpointError, DataError, UsageError
from ..losses import WeightedObjective, task_loss
from ..policies import ExitPolicy, ExitSignal
from ..problems import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from .configuration import FORMAT_VERSION
from .fingerprint import heads_fingerprint
from .gates import GATES
from .heads import HEADS
from .outputs import EarlyExitClassifierOutput

NEW_PARTS = ("exit_heads.", "exit_gates.")

logger = logging.get_logger(__name__)


class EarlyExitClassifier:
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

    # --- policy ---------------------------------------------------------------------------------------------------

    @property
    def exit_policy(self) -> ExitPolicy | None:
        """The policy that decides when rows leave, or `None`; it lives in `config.exit_policy`."""
        values = self.config.exit_policy
        return None if values is None else ExitPolicy.from_dict(values)

    def set_exit_policy(self, policy: ExitPolicy | CalibrationResult | None) -> None:
        """Serve with this policy from now on; `None` runs the model in full.

        Args:
            policy: a policy, or a calibration result, whose heads must then be this model's.

        Raises:
            EarlyExitConfigError: for a policy made for other exits or another problem type.
            CheckpointError: for a calibration of other exit heads.
        """
        if isinstance(policy, CalibrationResult):
            own = heads_fingerprint(self)
            if policy.fingerprint and policy.fingerprint != own:
                raise CheckpointError(
                    f"The thresholds were chosen on exit heads {policy.fingerprint}; this model has {own}. "
                    "Collect a trace of this model and calibrate again.",
                    field="fingerprint",
                    value=policy.fingerprint,
                )
            policy = policy.policy
        if policy is not None:
            if not isinstance(policy, ExitPolicy):
                raise UsageError(
                    f"policy is {policy!r}; expected an ExitPolicy or what `calibrate` returned.",
                    field="policy",
                    value=policy,
                )
            self.config.check_policy(policy)
        self.config.exit_policy = None if policy is None else policy.to_dict()

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
            kwargs: passed to the layers; `output_hidden_states`, `output_attentions` and `return_dict` as usual.

        Raises:
            UsageError: for early exit without a policy, in training, or with hidden states asked for.
            DataError: for inputs longer than the model takes.
        """
        from ..inference.engine import run_all, run_early

        policy = self._choose_policy(early_exit, kwargs)
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

    def _choose_policy(self, early_exit: bool | None, kwargs: dict[str, Any]) -> ExitPolicy | None:
        if early_exit is False or (early_exit is None and (self.training or self.config.exit_policy is None)):
            return None
        if self.config.exit_policy is None:
            raise UsageError(
                "early_exit=True, but no policy is set; calibrate first and call `model.set_exit_policy(result.policy)`.",
                field="early_exit",
            )
        if self.training:
            raise UsageError("early_exit=True in training mode; training needs every exit. Call model.eval() first.")
        for flag in ("output_hidden_states", "output_attentions"):
            if kwargs.get(flag, getattr(self.config, flag, False)):
                raise UsageError(
                    f"{flag} with early exit would give tensors of a different batch at every layer; pass early_exit=False.",
                    field=flag,
                )
        return self.exit_policy

    # --- saving and loading ---------------------------------------------------------------------------------------

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder also says that it holds exits, and in which format."""
        self.config.early_exit_version = FORMAT_VERSION
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a model with exits, or a plain checkpoint of the family, whose exits are then new.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            args, kwargs: as in transformers, and `init_missing_exits=True` to accept a checkpoint with exits whose
                exits differ from the config's: missing ones are initialised, others dropped. For training only.

        Raises:
            CheckpointError: if tensors are missing, of another shape, not finite, or the file is damaged.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        init_missing = kwargs.pop("init_missing_exits", False)
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
        _check_loaded(model, info, path, init_missing, any_size)
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


def _check_loaded(model: Any, info: Any, path: Any, init_missing: bool, any_size: bool) -> None:
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = sorted(info["mismatched_keys"])
    if mismatched and not any_size:
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"{len(mismatched)} tensors in {path} have another shape than the config asks for; first {name}: found "
            f"{list(found)}, expected {list(expected)}. Check num_labels and exit_head, or pass "
            "ignore_mismatched_sizes=True to start those afresh.",
            field=name,
            path=path,
        )
    stray = [name for name in unexpected if name.startswith(NEW_PARTS) and not init_missing]
    lost = [name for name in missing if not (init_missing and name.startswith(NEW_PARTS))]
    if model.config.early_exit_version is not None and (lost or stray):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in (("missing", lost), ("surplus", stray)) if names)
        raise CheckpointError(
            f"{path} says it holds a model with exits, but its tensors do not fit the config ({listed}). Restore the "
            "folder, or pass init_missing_exits=True to train those exits anew.",
            field=(lost or stray)[0],
            path=path,
        )
    for name, tensor in model.named_parameters():
        small = name.startswith((*NEW_PARTS, "classifier.")) and not tensor.is_meta
        if small and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} in {path} holds values that are not finite.", field=name, path=path)
    if any(name.startswith("exit_heads.") for name in missing):
        logger.warning_once(
            "The exits are new and know nothing yet: train them (EarlyExitTrainer), then calibrate, before exiting early."
        )
    elif any(name.startswith("exit_gates.") for name in missing):
        logger.warning_once("The gates are new and know nothing yet: train them (ConsistentTrainer) before they decide.")

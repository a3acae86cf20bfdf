"""One run from a plain model to exits that learned by reward: its phases, and how it is taken up again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import set_seed
from transformers.utils import logging

from ..errors import DataError, TrainingError, UsageError
from ..generation.language_model import EarlyExitLanguageModel
from ..generation.token_exits import ModelThatWrites
from ..losses import ConsistentObjective
from ..losses.noise import row_keys, row_noise
from ..modeling.protocol import TorchExitModel
from .consistent_arguments import ConsistentTrainingArguments
from .consistent_rows import RowLessons
from .consistent_tokens import TokenLessons
from .gate_report import warn_of_trouble
from .gates import train_gates
from .hardness import ExampleId, HardnessTable
from .run_folder import RunFolder
from .settings import check_arguments, check_settings, refused
from .trainer import EarlyExitTrainer

TABLE_FILE = "hardness.safetensors"
WHY_NOT = {  # arguments of `Trainer` that a run of phases has no place for
    "compute_loss_func": "phases weigh the loss of every row at every exit, and it gives one number a batch",
    "model_init": "each phase goes on from the weights of the one before; pass the model",
    "optimizers": "every phase begins with an optimizer of its own; choose its kind with optim and optim_args",
    "optimizer_cls_and_kwargs": "phases have learning rates of their own; choose the kind with optim and optim_args",
}
WHY_NOT_IN_TRAIN = {  # and arguments of `Trainer.train`
    "trial": "it sets arguments of one Trainer, and phases have several; make a ConsistentTrainer for each trial",
    "ignore_keys_for_eval": "evaluations keep the logits of the exits and their gates, and nothing else",
}

logger = logging.get_logger(__name__)


class Phase(NamedTuple):
    """One phase: its place in the run from 1, and its kind: "exits", "hardness", "gates" or "chosen"."""

    number: int
    kind: str

    @property
    def folder(self) -> str:
        """Where it keeps what it made, below the output folder."""
        return f"{self.number:02d}-{self.kind}"


class ConsistentTrainer:
    """Trains exits by reward, in phases: all exits; each row's hardness; the gates; the exits that rows choose.

    Every phase starts from the seed and the weights before it and writes into its own folder below `output_dir`; a run that
    was killed is taken up by `train(resume_from_checkpoint=True)` and ends with the same weights, to the bit.

    Args:
        model: a model with exits and gates (`exit_gate="mlp"`).
        args: settings of all phases.
        train_dataset: token ids or pictures, labels and a column of ids (`args.id_column`). Of language models texts, as
            `EarlyExitLanguageModelTrainer` takes them: each token leaves by itself, has a hardness and a reward.
        eval_dataset: the same without ids, to report on after every phase.
        gate_dataset: rows the exits do not learn from; their hardness is then not that of memorised rows, and gates learn
            from them alone. Ids must differ from the train rows'. By default the train rows, as in the paper.
        hardness_table: a table that stands in for the measurement, such as one joined from models that never saw the rows.
        processing_class, data_collator, callbacks: as in `Trainer`.
        compute_metrics, preprocess_logits_for_metrics: as in `Trainer`, for evaluations while exits are trained.
        others: whatever else `Trainer` takes is refused, and why.

    Raises:
        TrainingError, DataError: at set-up, for a model without gates, settings that cannot work, or data without ids or
            with a row that has no label.
        UnknownNameError: for an argument that there is not.

    Paper: ConsistentEE (https://arxiv.org/abs/2312.11882). Differences are told in the documentation.
    """

    def __init__(
        self,
        model: TorchExitModel,
        args: ConsistentTrainingArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        gate_dataset: Any = None,
        hardness_table: HardnessTable | None = None,
        processing_class: Any = None,
        data_collator: Any = None,
        callbacks: list[Any] | None = None,
        compute_metrics: Any = None,
        preprocess_logits_for_metrics: Any = None,
        **others: Any,
    ) -> None:
        check_arguments(others, ConsistentTrainer, WHY_NOT)
        if not isinstance(args, ConsistentTrainingArguments):
            raise TrainingError(f"args is {type(args).__name__}; expected ConsistentTrainingArguments.", field="args")
        if not len(model.exit_gates):
            raise TrainingError(
                "The model has no gates to train; load it with at least two exits and exit_gate='mlp', and with "
                "init_missing_exits=True if its exits are trained already.",
                field="exit_gate",
            )
        check_settings(args, args.make_objective(), model)
        self.model, self.args = model, args
        kind: Any = _lessons(model)
        self.lessons: RowLessons | TokenLessons = kind(model, args, processing_class)
        lessons = self.lessons
        self.train_dataset, self.eval_dataset = lessons.checked(train_dataset, "train_dataset"), None
        self.train_ids = self.gate_ids = lessons.ids(self.train_dataset)
        self.gate_dataset = self.train_dataset
        if eval_dataset is not None:
            self.eval_dataset = lessons.checked(eval_dataset, "eval_dataset")
        if gate_dataset is not None:
            self.gate_dataset = lessons.checked(gate_dataset, "gate_dataset")
            self.gate_ids = lessons.ids(self.gate_dataset)
            if set(self.train_ids) & set(self.gate_ids):
                raise DataError("train_dataset and gate_dataset share ids; keep their rows apart.", field="gate_dataset")
        self.given_table, self.hardness_table = hardness_table, hardness_table
        self._shared = {
            "processing_class": processing_class,
            "data_collator": data_collator,
            "callbacks": callbacks,
            "compute_metrics": compute_metrics,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        self.log_history: list[dict[str, Any]] = []
        if hardness_table is not None:
            hardness_table.of(self.train_ids)
            hardness_table.of(self.gate_ids)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What `train` runs, in order."""
        turn = ["gates", "chosen"] if self.args.chosen_epochs > 0 else ["gates"]
        kinds = [*([] if self.args.exits_trained else ["exits"]), "hardness", *turn * self.args.rounds]
        return tuple(Phase(number, kind) for number, kind in enumerate(kinds, 1))

    def train(
        self, resume_from_checkpoint: bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> list[dict[str, Any]]:
        """Run the phases that are not done yet.

        Args:
            resume_from_checkpoint: take up the run that `output_dir` holds.
            trial, ignore_keys_for_eval: refused, as phases have no place for them.

        Returns:
            The log, one entry per report; also in `log_history`.

        Raises:
            UsageError: if `output_dir` holds a run and it is not to be taken up, or for a checkpoint by name.
            TrainingError: if it was made with other settings, or for what is refused.
        """
        for name, value in (("trial", trial), ("ignore_keys_for_eval", ignore_keys_for_eval)):
            if value is not None:
                raise refused(name, value, WHY_NOT_IN_TRAIN[name])
        if resume_from_checkpoint not in (None, True, False):
            raise UsageError(
                f"resume_from_checkpoint is {resume_from_checkpoint!r}; expected True: the phases of a run lie below "
                "output_dir, and each is taken up where it stands.",
                field="resume_from_checkpoint",
                value=resume_from_checkpoint,
            )
        run = RunFolder(str(self.args.output_dir), self.args.should_save)
        run.open(self.args.consistent_settings(), bool(resume_from_checkpoint))
        self.log_history = []
        for phase in self.phases:
            folder = run.path / phase.folder
            if run.is_done(phase.folder):
                self.log_history += run.restore(phase.folder, self.model)
                if phase.kind == "hardness":
                    self.hardness_table = HardnessTable.load(folder / TABLE_FILE)
                continue
            set_seed(self.args.seed + phase.number)
            logger.info(f"Phase {phase.number} of {len(self.phases)}: {phase.kind}")
            logs = getattr(self, f"_run_{phase.kind}")(phase, folder)
            logs.append(self._report())
            logs = [{"phase": phase.folder, **log} for log in logs]
            self.log_history += logs
            run.finish(phase.folder, self.model, logs)
        self.model.requires_grad_(True).eval()
        return self.log_history

    def save_model(self, output_dir: str | None = None) -> None:
        """Save the model, by default into `output_dir`."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir)
            if self._shared["processing_class"] is not None:
                self._shared["processing_class"].save_pretrained(output_dir or self.args.output_dir)

    # --- phases ---------------------------------------------------------------------------------------------------

    def _run_exits(self, phase: Phase, folder: Path) -> list[dict[str, Any]]:
        args = self._phase_args(phase, folder)
        trainer = self.lessons.trainer(
            model=self.model, args=args, train_dataset=self.train_dataset, eval_dataset=self.eval_dataset, **self._shared
        )
        return self._run_trainer(trainer)

    def _run_hardness(self, phase: Phase, folder: Path) -> list[dict[str, Any]]:
        tables = []
        if self.given_table is None:
            parts = [(self.train_dataset, self.train_ids)]
            if self.gate_dataset is not self.train_dataset:
                parts.append((self.gate_dataset, self.gate_ids))
            for rows, ids in parts:
                tables.append(HardnessTable.measured(self.lessons.outcomes(rows), ids, self.args.hardness))
        table = self.hardness_table = self.given_table or HardnessTable.joined(tables)
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            table.save(folder / TABLE_FILE)
        shares = {f"hardness_{layer}_share": share for layer, share in table.histogram().items() if share}
        return [{"hardness": table.measure, **shares}]

    def _run_gates(self, phase: Phase, folder: Path) -> list[dict[str, Any]]:
        keys = row_keys(self.gate_ids)
        # by lot, but by the rows' own lot: the same rows in the same order however the data set is shuffled
        chosen = row_noise(keys, self.args.seed, 0, (1,))[:, 0].argsort(stable=True)[: self.args.max_gate_rows]
        ids = [self.gate_ids[place] for place in chosen.tolist()]
        data = self.lessons.states(self.gate_dataset, chosen)
        judged = data if self.eval_dataset is None else self.lessons.states(self.eval_dataset, split="eval")
        logs: list[dict[str, Any]] = []

        def report(epoch: int) -> None:
            metrics = judged.metrics(self.model.exit_gates, self._objective, self.args.hardness)
            logs.append({"epoch": epoch, **metrics})
            warn_of_trouble([*self.log_history, *logs])

        train_gates(
            self.model.exit_gates,
            data,
            self._hardness_of(ids),
            keys[chosen],
            self._objective,
            self.args.make_gate_recipe(self.args.seed + phase.number),
            self.args.make_epsilon(),
            report,
        )
        return logs

    def _run_chosen(self, phase: Phase, folder: Path) -> list[dict[str, Any]]:
        hardness = self._hardness_of(self.train_ids)
        rows = self.lessons.with_hardness(self.train_dataset, hardness, row_keys(self.train_ids))
        args = self._phase_args(phase, folder)
        args.num_train_epochs, args.max_steps, args.learning_rate = (
            self.args.chosen_epochs,
            -1,
            self.args.chosen_learning_rate,
        )
        trainer = self.lessons.chosen_trainer(
            objective=self._objective,
            teaches_gates=self.args.chosen_phase == "joint",
            epsilon=self.args.make_epsilon(),
            seed=self.args.seed + phase.number,
            model=self.model,
            args=args,
            train_dataset=rows,
            eval_dataset=self.eval_dataset,
            **self._shared,
        )
        return self._run_trainer(trainer)

    def _hardness_of(self, ids: Sequence[ExampleId]) -> Tensor:
        """Hardness of rows `[N]`, as an earlier phase has measured it."""
        assert self.hardness_table is not None
        return self.hardness_table.of(ids)

    @property
    def _objective(self) -> ConsistentObjective:
        return self.args.make_consistent_objective()

    def _phase_args(self, phase: Phase, folder: Path) -> ConsistentTrainingArguments:
        args = copy.copy(self.args)
        args.output_dir, args.seed = str(folder), self.args.seed + phase.number
        return args

    def _run_trainer(self, trainer: EarlyExitTrainer) -> list[dict[str, Any]]:
        checkpoint = trainer.newest_checkpoint()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return list(trainer.state.log_history)

    def _report(self) -> dict[str, Any]:
        """What every exit and the gates do on the evaluation rows."""
        return {} if self.eval_dataset is None else self.lessons.report(self.eval_dataset)


def _lessons(model: object) -> type[RowLessons] | type[TokenLessons]:
    """What a model's gates learn from.

    Raises:
        TrainingError: for captioners.
    """
    if isinstance(model, EarlyExitLanguageModel):
        return TokenLessons
    if isinstance(model, ModelThatWrites):
        raise TrainingError(
            "ConsistentTrainer trains classifiers and language models; gates of captioners learn with "
            "EarlyExitCaptioningTrainer(..., learn_gates=True).",
            field="model",
        )
    return RowLessons

"""Saving and pushing a run without the pickle of its settings, which names local paths and may hold the token."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from .checkpoints import TRAINER_STATE

PICKLES = (".bin", ".pt", ".pth")
SETTINGS = "training_args.bin"

logger = logging.get_logger(__name__)


class NoPickledSettings:
    """Part of a `Trainer` that keeps `training_args.bin` out of its folders and off the Hub; nothing reads that file."""

    args: Any
    # what `Trainer` brings
    state: Any
    control: Any
    callback_handler: Any
    hub_model_id: Any
    push_in_progress: Any
    is_world_process_zero: Callable[[], bool]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, SETTINGS).unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, which writes the pickle anew here; the file that config.json points to goes along.

        With `hub_always_push` it waits until the push before is done. `Trainer` writes into the folder that is still being
        read: the commit of one save may then hold files of the next, which is left with nothing to commit.
        """
        args = self.args
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END or (busy and not args.hub_always_push):
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        for file in Path(checkpoint_folder).iterdir():  # a copy, since the checkpoint may be deleted before it is uploaded
            if file.is_file() and file.suffix not in PICKLES and file.name != TRAINER_STATE:
                shutil.copy(file, args.output_dir)
        by_steps = args.save_strategy == SaveStrategy.STEPS
        done = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch)}"
        jobs = [self._upload(args.output_dir, f"Training in progress, {done}", ignore_patterns=["_*", "checkpoint-*"])]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            only_last = args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if only_last else Path(checkpoint_folder).name
            jobs.append(self._upload(checkpoint_folder, f"Training in progress, {done}, checkpoint", path_in_repo=place))
        self.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]  # it takes a list, as `Trainer` gives it

    def _finish_current_push(self) -> None:
        """As in `Trainer`; an upload that failed is told."""
        super()._finish_current_push()  # type: ignore[misc]
        running, self.push_in_progress = getattr(self, "push_in_progress", None), None
        for error in [job.exception() for job in running.jobs] if running is not None else []:
            if error is not None:
                logger.warning(f"A push to {self.hub_model_id} failed ({error}); training goes on.")

    def _upload(self, folder: str, message: str, **kwargs: Any) -> Any:
        return hf_api().upload_folder(  # the one client whose uploads queue up in order
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            token=self.args.hub_token,
            run_as_future=True,
            revision=self.args.hub_revision,
            **kwargs,
        )

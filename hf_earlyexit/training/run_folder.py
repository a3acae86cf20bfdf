"""The folder of a run in phases: what is done, with which settings, and the weights each phase ended with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..errors import CheckpointError, TrainingError, UsageError
from ..files import read_json, write_json
from ..modeling.protocol import TorchExitModel
from .weights import load_weights

SETTINGS_FILE, DONE_FILE, MODEL_FOLDER = "run.json", "done.json", "model"


class RunFolder:
    """A folder with one sub-folder per phase; a phase counts as done when its mark is there, which is written last.

    Args:
        path: of the run.
        writes: whether this process writes; with several, one does.
    """

    def __init__(self, path: str | Path, writes: bool) -> None:
        self.path, self.writes = Path(path), writes

    def open(self, settings: dict[str, Any], resume: bool) -> None:
        """Begin a run, or take up one that was made with the same settings.

        Raises:
            UsageError: if there is a run and it is not to be taken up.
            TrainingError: if it was made with other settings.
        """
        file = self.path / SETTINGS_FILE
        is_new = not file.is_file()
        PartialState().wait_for_everyone()  # all have looked before one writes
        if is_new:
            if self.writes:
                write_json(file, settings)
            return
        if not resume:
            raise UsageError(
                f"{self.path} holds a run; take it up with resume_from_checkpoint=True, or choose another folder.",
                field="output_dir",
                path=self.path,
            )
        before = read_json(file)
        for name, value in settings.items():
            if before.get(name) != value:
                raise TrainingError(
                    f"The run in {self.path} was started with {name}={before.get(name)!r}, now it is {value!r}; set it "
                    "back, or choose another folder.",
                    field=name,
                    value=value,
                )

    def is_done(self, phase: str) -> bool:
        """Whether a phase was run to its end."""
        return (self.path / phase / DONE_FILE).is_file()

    def finish(self, phase: str, model: TorchExitModel, log: list[dict[str, Any]]) -> None:
        """Keep what a phase ended with, and mark it as done."""
        if self.writes:
            model.save_pretrained(self.path / phase / MODEL_FOLDER)
            write_json(self.path / phase / DONE_FILE, {"log": log}, allow_nan=True)  # as norms of float16 gradients are
        PartialState().wait_for_everyone()

    def restore(self, phase: str, model: TorchExitModel) -> list[dict[str, Any]]:
        """Give the model the weights a phase ended with.

        Returns:
            The phase's log.

        Raises:
            CheckpointError: if they are lost, damaged or of another model.
        """
        file = self.path / phase / MODEL_FOLDER / "model.safetensors"
        try:
            load_weights(model, file.parent)
        except (CheckpointError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{file.parents[1]} says it is done, but {file.name} cannot be taken up ({error}); start again in another "
                "folder.",
                path=file,
            ) from error
        return list(read_json(self.path / phase / DONE_FILE, finite=False)["log"])

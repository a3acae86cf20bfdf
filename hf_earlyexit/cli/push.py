"""Push a saved model with its tokenizer, image processor, calibration and card to the Hub, in one commit.

    hf-earlyexit push bert-with-exits --repo_id me/reviews --private true
    hf-earlyexit push bert-with-exits --repo_id me/reviews --test_rows reviews --test_split test

With labelled rows that neither trained nor chose anything, the card tells quality and measured time on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .arguments import SPLITS, DeviceArguments, RowArguments
from .command_result import CommandResult


@dataclass
class PushArguments(RowArguments, DeviceArguments):
    """What goes where."""

    model: str = field(metadata={"help": "folder of a model with exits"})
    repo_id: str = field(metadata={"help": "owner/name on the Hub; made if it is not there"})
    private: bool | None = field(default=None, metadata={"help": "of a new repository; the owner's default if not given"})
    revision: str | None = field(default=None, metadata={"help": "branch to push to"})
    create_pr: bool = field(default=False, metadata={"help": "propose a pull request"})
    commit_message: str = field(default="Upload model with early exits", metadata={"help": "first line of the commit"})
    card: bool = field(default=True, metadata={"help": "false leaves the model card on the Hub alone"})
    base_model: str | None = field(default=None, metadata={"help": "for the card: Hub id of the model it was made from"})
    datasets: list[str] = field(default_factory=list, metadata={"help": "for the card: Hub ids of its data sets"})
    test_rows: str | None = field(
        default=None,
        metadata={"help": f"for the card: rows that neither trained nor chose anything, to judge and time on; a {SPLITS}"},
    )
    test_split: str | None = field(default=None, metadata={"help": "split of these rows; test by default"})
    evaluated_on: str | None = field(default=None, metadata={"help": "for the card: Hub id of these rows"})
    repeats: int = field(default=5, metadata={"help": "rounds of timing on these rows; 0 for no timing"})
    language: str | None = field(default=None, metadata={"help": "for the card: such as en"})
    license: str | None = field(default=None, metadata={"help": "for the card: such as apache-2.0"})


ARGUMENTS = (PushArguments,)


def run(args: PushArguments) -> CommandResult:
    """Load and push."""
    from ..hub.push import push_to_hub
    from ..hub.save import load_calibrations
    from .loading import load_any, load_parts_there, on_device

    folder = Path(args.model)
    if not folder.is_dir():
        raise UsageError(f"{args.model} is no folder; name one that holds a saved model.", path=folder)
    parts = load_parts_there(folder)
    model, calibration = load_any(folder), load_calibrations(folder)
    fields = ("base_model", "datasets", "language", "license", "evaluated_on")
    card: Any = {name: getattr(args, name) for name in fields} if args.card else False
    if args.test_rows is not None and args.card:
        from ..data.labelling import Labelling
        from ..hub.figures import card_figures
        from ..serving.reader import reads_images
        from .rows import read_rows, rows_and_labelling

        rows = read_rows(args, args.test_rows, args.test_split, "test", reads_images(model))
        rows, _ = rows_and_labelling(args, rows, Labelling.of_model(model.config))
        model = on_device(model, args.device)
        card |= card_figures(model, calibration, rows, **parts, repeats=args.repeats)
    commit = push_to_hub(
        model,
        args.repo_id,
        **parts,
        calibration=calibration,
        card=card,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
    )
    values = {"repo_id": args.repo_id, "commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url}
    return CommandResult(values, f"pushed {commit.pr_url or commit.commit_url}")

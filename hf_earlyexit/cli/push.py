"""Push a saved model with its tokenizer, calibration and card to the Hub, in one commit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from ..errors import UsageError
from ..hub.push import push_to_hub
from ..hub.save import load_calibrations
from .answer import Answer
from .loading import load_model


@dataclass
class PushArguments:
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
    language: str | None = field(default=None, metadata={"help": "for the card: such as en"})
    license: str | None = field(default=None, metadata={"help": "for the card: such as apache-2.0"})


ARGUMENTS = (PushArguments,)


def run(args: PushArguments) -> Answer:
    """Load and push."""
    folder = Path(args.model)
    if not folder.is_dir():
        raise UsageError(f"{args.model} is no folder; name one that holds a saved model.", path=folder)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    told = {"base_model": args.base_model, "datasets": args.datasets, "language": args.language, "license": args.license}
    commit = push_to_hub(
        load_model(folder),
        args.repo_id,
        tokenizer=AutoTokenizer.from_pretrained(folder) if has_tokenizer else None,
        calibration=load_calibrations(folder),
        card=told if args.card else False,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
    )
    values = {"repo_id": args.repo_id, "commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url}
    return Answer(values, f"pushed {commit.pr_url or commit.commit_url}")

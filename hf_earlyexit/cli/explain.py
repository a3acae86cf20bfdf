"""Tell why a text or a picture leaves where it does: a few sentences, and every exit's prediction, score and threshold.

    hf-earlyexit explain --model bert-with-exits --text "not bad at all"
    hf-earlyexit explain --model vit-with-exits --image cat.jpg

All layers are run for it, also those that serving skips.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ..errors import UsageError
from .arguments import DeviceArguments
from .command_result import CommandResult


@dataclass
class ExplainArguments(DeviceArguments):
    """Which model on which text or picture."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits and a policy"})
    text: str | None = field(default=None, metadata={"help": "the text"})
    text_pair: str | None = field(default=None, metadata={"help": "second text, for models of pairs"})
    image: str | None = field(default=None, metadata={"help": "the picture's file, for models of pictures"})
    operating_point: str | None = field(default=None, metadata={"help": "name of the policy to explain"})


ARGUMENTS = (ExplainArguments,)


def run(args: ExplainArguments) -> CommandResult:
    """Explain one row."""
    from ..serving.explain import explain
    from ..serving.reader import reads_images
    from .loading import load_model, reading_parts

    model = load_model(args.model, args.device)
    needed, others = ("image", ("text", "text_pair")) if reads_images(model) else ("text", ("image",))
    for name in others:
        if getattr(args, name) is not None:
            raise UsageError(f"{args.model} reads one {needed}: give it with --{needed}, not --{name}.", field=name)
    if getattr(args, needed) is None:
        raise UsageError(f"There is nothing to explain: give the {needed} with --{needed}.", field=needed)
    row = getattr(args, needed) if args.text_pair is None else (args.text, args.text_pair)
    explanation = explain(model, row, **reading_parts(args.model, model), operating_point=args.operating_point)
    return CommandResult(dataclasses.asdict(explanation), str(explanation))

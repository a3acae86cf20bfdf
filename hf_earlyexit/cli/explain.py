"""Tell why a text leaves where it does: a few sentences, and every exit's prediction, score and threshold.

    hf-earlyexit explain --model bert-with-exits --text "not bad at all"

All layers are run for it, also those that serving skips.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from .answer import Answer
from .arguments import DeviceArguments


@dataclass
class ExplainArguments(DeviceArguments):
    """Which model on which text."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits and a policy"})
    text: str = field(metadata={"help": "the text"})
    text_pair: str | None = field(default=None, metadata={"help": "second text, for models of pairs"})
    operating_point: str | None = field(default=None, metadata={"help": "name of the policy to explain"})


ARGUMENTS = (ExplainArguments,)


def run(args: ExplainArguments) -> Answer:
    """Explain one text."""
    from transformers import AutoTokenizer

    from ..serving.explain import explain
    from .loading import load_model

    model = load_model(args.model, args.device)
    text = args.text if args.text_pair is None else (args.text, args.text_pair)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    explanation = explain(model, text, tokenizer=tokenizer, operating_point=args.operating_point)
    return Answer(dataclasses.asdict(explanation), str(explanation))

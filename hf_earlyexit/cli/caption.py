"""Caption pictures; each word comes with the layer of the decoder that it was decided at.

    hf-earlyexit caption captioner beach.jpg dog.png
    hf-earlyexit caption captioner photos --batch_size 8 --html captions.html
    hf-earlyexit caption captioner beach.jpg --num_beams 3 --operating_point fast --json
    hf-earlyexit caption captioner photos --lossless true

MODEL, then files, or folders whose pictures are all taken. --html writes a page to look at: pictures, captions, and words in
the colour of their layer. --early_exit false runs the full model. With --lossless, captions are the full model's own, and
exits only save work: drafts are made by the operating point that `calibrate --lossless true` kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..values import check_whole
from .arguments import DeviceArguments, given
from .command_result import CommandResult


@dataclass
class CaptionArguments(DeviceArguments):
    """Which model on which pictures."""

    model: str = field(metadata={"help": "folder or Hub id of a captioner with exits"})
    images: list[str] = field(default_factory=list, metadata={"help": "pictures, or folders of them"})
    operating_point: str | None = field(default=None, metadata={"help": "name of the policy to use; exact: the full model"})
    early_exit: bool | None = field(default=None, metadata={"help": "false runs the full model"})
    lossless: bool = field(
        default=False,
        metadata={"help": "exits draft, the layers above check; captions stay the full model's own, without beams"},
    )
    num_beams: int | None = field(default=None, metadata={"help": "beams of the search; as the model's own config says"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "longest caption; as the model's own config says"})
    batch_size: int = field(default=1, metadata={"help": "pictures at a time; changes no caption"})
    html: str | None = field(default=None, metadata={"help": "page to write, with pictures and captions"})


ARGUMENTS = (CaptionArguments,)
REST = "--images"


def run(args: CaptionArguments) -> CommandResult:
    """Load, caption, show."""
    from ..doors import CAPTIONING
    from ..pipelines import pipeline
    from .loading import drafting_point, load_captioner, load_input_parts

    pictures = _pictures(args.images)
    check_whole(1, **given(args, "batch_size", "num_beams", "max_new_tokens"))
    model = load_captioner(args.model, args.device)
    drafting_point(args, model)  # refused before anything runs
    pipe = pipeline(
        CAPTIONING,
        model=model,
        device=model.device,
        **load_input_parts(args.model),
        operating_point=args.operating_point,
        early_exit=args.early_exit,
        lossless=args.lossless,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
    )
    captions = pipe([str(picture) for picture in pictures], batch_size=args.batch_size)
    depth = model.exit_layers[-1]
    layers = [layer for caption in captions for layer in caption["exit_layers"]]
    values = {
        "images": len(pictures),
        "mean_exit_layer": sum(layers) / len(layers) if layers else None,
        "num_layers": depth,
        "captions": [{"image": str(picture), **caption} for picture, caption in zip(pictures, captions, strict=True)],
    }
    text = "\n".join(_line(picture, caption, depth) for picture, caption in zip(pictures, captions, strict=True))
    if args.html is not None:
        from ..captions.page import caption_page  # needs jinja2, which captions alone do not

        caption_page(pictures, captions, args.html, num_layers=depth, title=f"Captions by {Path(args.model).name}")
        values["html"] = args.html
        text += f"\nsaved {args.html}"
    return CommandResult(values, text)


def _pictures(given: Sequence[str]) -> list[Path]:
    from ..images import SUFFIXES

    pictures: list[Path] = []
    for name in map(Path, given):
        if name.is_dir():
            inside = sorted(path for path in name.iterdir() if path.suffix.lower() in SUFFIXES)
            if not inside:
                raise UsageError(f"The folder {name} holds no picture: {' '.join(SUFFIXES)}.", field="images", path=name)
            pictures += inside
        elif name.is_file():
            pictures.append(name)
        else:
            raise UsageError(f"There is no picture {name}; check the name.", field="images", path=name)
    if not pictures:
        raise UsageError("No pictures: name files or folders after the model.", field="images")
    return pictures


def _line(picture: Path, caption: dict[str, Any], depth: int) -> str:
    words = " ".join(f"{word['word']}/{word['exit_layer']}" for word in caption["words"])
    return f"{picture.name}: {words or 'nothing'}  (mean layer {caption['mean_exit_layer']:.2f} of {depth})"

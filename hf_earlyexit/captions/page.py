"""Pictures with their captions on one HTML page, each word in the colour of the layer it was decided at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

from ..errors import DataError
from ..images import embedded, picture_name
from ..reports.page import write_page

LONGEST_SIDE = 560  # of a picture on the page, in pixels
EARLY, LATE = (224, 242, 238), (11, 79, 74)  # from a light teal to a dark one
MIDDLE = 0.179  # of luminance: black reads better on what is lighter, white on what is darker


class Shade(NamedTuple):
    """How a layer looks on the page."""

    layer: int
    back: str
    front: str


class Item(NamedTuple):
    """A picture on the page; `full` is what the full model says, where that is something else."""

    picture: str
    name: str | None
    caption: Mapping[str, Any]
    full: str | None


def caption_page(
    images: Sequence[Any],
    captions: Sequence[Mapping[str, Any]],
    path: str | PathLike[str],
    *,
    num_layers: int,
    full: Sequence[Mapping[str, Any]] | None = None,
    title: str = "Captions",
) -> None:
    """Write pictures and captions as one HTML file without scripts or links.

    Pictures are made small and written anew, so that no place or camera that a photo names goes along.

    Args:
        images: names of files, or PIL images.
        captions: what the early-exit-captioning pipeline answered, one for each picture.
        path: file to write, its folder made if it is not there; an existing one is replaced.
        num_layers: L of the decoder, `model.exit_layers[-1]`.
        full: what the full model answered, shown where it says something else.
        title: of the page.

    Raises:
        DataError: for no pictures, captions that are not one for each, and what is no picture.

    Examples:
        >>> import hf_earlyexit as ee
        >>> pipe = ee.pipeline("early-exit-captioning", model="captioner")  # doctest: +SKIP
        >>> ee.captions.caption_page(photos, pipe(photos), "captions.html", num_layers=12)  # doctest: +SKIP
    """
    _check(images, captions, full, num_layers)
    layers = [layer for caption in captions for layer in caption["exit_layers"]]
    mean = sum(layers) / len(layers) if layers else None
    items = []
    for place, (image, caption) in enumerate(zip(images, captions, strict=True)):
        whole = None if full is None else full[place]["generated_text"]
        differs = whole is not None and whole != caption["generated_text"]
        items.append(Item(embedded(image, LONGEST_SIDE), picture_name(image), caption, whole if differs else None))
    write_page(
        "captions.html",
        path,
        title=title,
        items=items,
        shades=[_shade(layer, num_layers) for layer in range(1, num_layers + 1)],
        shares=[layers.count(layer) / max(len(layers), 1) for layer in range(1, num_layers + 1)],
        num_layers=num_layers,
        num_tokens=len(layers),
        mean=mean,
        compared=full is not None,
        same=sum(item.full is None for item in items),
    )


def _check(images: Sequence[Any], captions: Sequence[Any], full: Sequence[Any] | None, num_layers: int) -> None:
    if not len(images):
        raise DataError("No pictures: expected at least one.", field="images")
    for name, given in (("captions", captions), ("full", full)):
        if given is not None and len(given) != len(images):
            raise DataError(
                f"{len(given)} {name} for {len(images)} pictures; expected one for each.", field=name, value=len(given)
            )
    deepest = max((layer for caption in captions for layer in caption["exit_layers"]), default=1)
    if deepest > num_layers:
        raise DataError(
            f"num_layers is {num_layers}, but a token left after layer {deepest}; pass model.exit_layers[-1].",
            field="num_layers",
            value=num_layers,
        )


def _shade(layer: int, num_layers: int) -> Shade:
    part = (layer - 1) / max(num_layers - 1, 1)
    back = [round(early + part * (late - early)) for early, late in zip(EARLY, LATE, strict=True)]
    linear = [(value / 255 / 12.92) if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in back]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    front = "#000000" if luminance > MIDDLE else "#ffffff"
    return Shade(layer, "#{:02x}{:02x}{:02x}".format(*back), front)

"""Images and captions as rows, and rows as batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import DataError
from ..images import open_image
from .batches import FEATURES, IMAGE, PIXELS, image_inputs


class CaptionRows(torch.utils.data.Dataset[Any]):
    """One row per caption, from a data set with an image and its captions in each row.

    Images are opened when a row is asked for, so that five captions of one image cost no more room than one. Labels are the
    caption's tokens and the one that ends it; the start token is not among them.

    Args:
        rows: a data set or list of rows with `image` and `captions`.
        image_processor: makes `pixel_values`; not needed with features.
        tokenizer: of the captions.
        features: the encoder's last states of each image `[images, tokens, width]`, anything that is indexed such as a
            memory-mapped array; rows then hold `encoder_hidden_states`, no image is opened and the encoder does not learn.
        max_length: most labels of a caption.
        image_column, captions_column: names; captions are a text or a list of texts.

    Raises:
        DataError: for no captions, features of another number of images, or a tokenizer without a token that ends captions.
    """

    def __init__(
        self,
        rows: Any,
        image_processor: Any = None,
        tokenizer: Any = None,
        *,
        features: Any = None,
        max_length: int = 40,
        image_column: str = IMAGE,
        captions_column: str = "captions",
    ) -> None:
        end = getattr(tokenizer, "eos_token_id", None)
        end = getattr(tokenizer, "sep_token_id", None) if end is None else end
        if end is None:
            raise DataError("The tokenizer has neither an eos nor a sep token; set tokenizer.eos_token.", field="tokenizer")
        if features is None and image_processor is None:
            raise DataError("Pass an image_processor, or the features of the images.", field="image_processor")
        if features is not None and len(features) != len(rows):
            raise DataError(f"{len(features)} features for {len(rows)} images; expected one each.", field="features")
        self.rows, self.image_processor, self.features, self.image_column = rows, image_processor, features, image_column
        self.labels: list[list[int]] = []
        self.places: list[int] = []  # of each caption's image
        for place, captions in enumerate(_column(rows, captions_column)):
            texts = [captions] if isinstance(captions, str) else list(captions)
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []:
                self.labels.append([*ids, end][:max_length])
                self.places.append(place)
        if not self.labels:
            raise DataError(f"The rows hold no captions in {captions_column!r}.", field=captions_column)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place, labels = self.places[index], self.labels[index]
        if self.features is not None:
            return {FEATURES: np.asarray(self.features[place]), "labels": labels}
        picture = open_image(self.rows[place][self.image_column], self.image_column)
        return {PIXELS: self.image_processor(picture, return_tensors="pt")[PIXELS][0], "labels": labels}


def _column(rows: Any, name: str) -> Sequence[Any]:
    names = getattr(rows, "column_names", None)
    if names is None:
        names = list(rows[0]) if len(rows) and isinstance(rows[0], Mapping) else []
        values: Sequence[Any] = [row[name] for row in rows] if name in names else []
    else:
        values = rows[name] if name in names else []
    if name not in names:
        raise DataError(f"The rows have {', '.join(names) or 'no columns'}; expected {name!r} among them.", field=name)
    return values


class CaptionCollator:
    """Makes a batch of rows with `labels` and `pixel_values`, or `encoder_hidden_states` in place of images.

    Labels are padded with -100. Other columns are left out.

    Raises:
        DataError: for rows without labels or images.

    Examples:
        >>> import hf_earlyexit as ee
        >>> rows = [{"labels": [5, 2], "encoder_hidden_states": [[0.1]]}, {"labels": [2], "encoder_hidden_states": [[0.2]]}]
        >>> ee.captions.CaptionCollator()(rows)["labels"].tolist()
        [[5, 2], [2, -100]]
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if any("labels" not in row for row in rows):
            raise DataError(
                f"A row has {', '.join(rows[0])}; expected labels among them: the caption's token ids.", field="labels"
            )
        labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
        return {**image_inputs(rows), "labels": pad_sequence(labels, batch_first=True, padding_value=-100)}


def check_caption_rows(rows: Any, name: str, vocab_size: int) -> None:
    """Refuse captions that cannot be learned, as far as they can be looked through without opening images.

    Args:
        rows: a data set; one that is neither `CaptionRows` nor has columns is looked at when its batches come.
        name: the argument it came as.
        vocab_size: of the decoder.

    Raises:
        DataError: for no rows, no labels, labels out of range or a caption with none to learn, naming the row.
    """
    if not hasattr(rows, "__len__"):
        return
    if len(rows) == 0:
        raise DataError(f"{name} has no rows.", field=name)
    columns = getattr(rows, "column_names", None)
    if isinstance(rows, CaptionRows):
        captions: Sequence[Any] = rows.labels
    elif columns is None:
        return
    elif "labels" not in columns:
        raise DataError(
            f"{name} has the columns {', '.join(columns)}; expected labels among them: the caption's token ids.",
            field="labels",
        )
    else:
        captions = rows.select_columns(["labels"])["labels"]
    for row, ids in enumerate(captions):
        values = np.asarray(ids)
        kept = values[values != -100]
        if not len(kept):
            raise DataError(f"Row {row} of {name} has no label to learn: none, or all -100.", field="labels")
        if kept.min() < 0 or kept.max() >= vocab_size:
            bad = kept[(kept < 0) | (kept >= vocab_size)][0]
            raise DataError(
                f"Row {row} of {name} has label {bad}; expected 0 to {vocab_size - 1}, or -100 to leave a token out.",
                field="labels",
                value=int(bad),
            )

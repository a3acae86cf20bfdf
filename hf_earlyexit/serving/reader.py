"""How rows become what a model reads: texts as token ids, pictures as pixel values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import EarlyExitError, UsageError
from ..families.base import IMAGE
from ..modeling.protocol import Wrapped
from ..values import check_whole, shown
from .pictures import PictureRows, encode_pictures, picture_columns
from .rows import encode_rows, encode_window
from .tables import named_columns, windows

PICTURES = 256  # read at once; prepared, one takes much room


def reads_images(model: Wrapped) -> bool:
    """Whether a classifier's rows are pictures."""
    family = getattr(model, "family", None)
    return family is not None and family.task == IMAGE


class RowReader(NamedTuple):
    """What rows are read with; make it with `reader_for`.

    Attributes:
        images: whether rows are pictures.
        tokenizer: for texts.
        max_length: cut longer texts.
        image_processor: for pictures.
    """

    images: bool
    tokenizer: Any = None
    max_length: int | None = None
    image_processor: Any = None

    @property
    def columns(self) -> Callable[[Iterable[str]], tuple[str, ...]]:
        """Chooses the columns that are read."""
        return picture_columns if self.images else named_columns

    def windows(self, rows: Any, size: int) -> Iterator[list[Any]]:
        """As `tables.windows`."""
        return windows(rows, size, self.columns)

    def encode(self, window: Sequence[Any], first: int = 0) -> list[Any]:
        """What the model reads of every row; for one that cannot be read, the error."""
        if self.images:
            return encode_pictures(window, self.image_processor, first)
        return encode_window(window, self.tokenizer, self.max_length, first)

    def encode_all(self, rows: Any) -> Sequence[Any]:
        """What the model reads of every row: token ids now, pictures each when it is asked for.

        Raises:
            EarlyExitError: for the first row that cannot be read; of pictures, when it is asked for.
        """
        return PictureRows(rows, self.image_processor) if self.images else encode_rows(rows, self.tokenizer, self.max_length)


def reader_for(
    model: Wrapped, tokenizer: Any = None, max_length: int | None = None, image_processor: Any = None
) -> RowReader:
    """The reader of a model's rows.

    Raises:
        UsageError: for a tokenizer or `max_length` where rows are pictures, an image processor where they are texts, and
            for what is none of these.
    """
    images = reads_images(model)
    given = {"tokenizer": tokenizer, "max_length": max_length} if images else {"image_processor": image_processor}
    for name, value in given.items():
        if value is not None:
            kind = "pictures: pass image_processor=..." if images else "texts: pass tokenizer=..."
            raise UsageError(f"{name} is given, and {type(model).__name__} reads {kind}", field=name)
    for name, value in (("tokenizer", tokenizer), ("image_processor", image_processor)):
        if value is not None and not callable(value):
            raise UsageError(
                f"{name} is {shown(value)}; expected one that is loaded, as AutoTokenizer.from_pretrained(...) or "
                "AutoImageProcessor.from_pretrained(...) gives it.",
                field=name,
                value=value,
            )
    if max_length is not None:
        check_whole(1, max_length=max_length)
    return RowReader(images, tokenizer, max_length, image_processor)


def first_error(encoded: Sequence[Any], check: Callable[[Any, int], EarlyExitError | None], first: int) -> None:
    """Raise the first error among encoded rows, or of what `check(row, number)` finds."""
    for number, row in enumerate(encoded, first):
        error = row if isinstance(row, EarlyExitError) else check(row, number)
        if error is not None:
            raise error

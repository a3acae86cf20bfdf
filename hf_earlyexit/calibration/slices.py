"""Slices of the data that must each keep a promise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError

Parts = dict[str, NDArray[np.bool_]]


def check_groups(groups: Any, count: int) -> NDArray[Any] | None:
    """The number or name of each row's slice `[count]`, or `None` as given.

    Raises:
        CalibrationError: for another shape, or for anything but whole numbers and names.
    """
    if groups is None:
        return None
    given = np.asarray(groups)
    if given.shape != (count,):
        raise CalibrationError(
            f"groups has shape {given.shape}; expected one number or name for each of {count} rows.", field="groups"
        )
    if given.dtype.kind not in "biuUS":
        raise CalibrationError(
            f"groups are {given.dtype}; expected a whole number or a name for each row's slice.", field="groups"
        )
    return given


def parts_by(by: str, member: NDArray[Any]) -> Parts:
    """The units of each slice, by name; `member` tells each unit's slice `[N]`."""
    return {f"{by} {value}": member == value for value in np.unique(member)}

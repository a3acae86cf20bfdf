"""What can go wrong, in one base class and few kinds.

Every error says what came, what was expected and what to do next. `field`, `value` and `path` repeat the first of these
for programs.
"""

from __future__ import annotations

from typing import Any


class EarlyExitError(ValueError):
    """Base of all errors raised on purpose by this library.

    Args:
        message: what came, what was expected, what to do.
        field: name of the argument, config field or tensor at fault.
        value: the value that came.
        path: file or folder it came from.
    """

    def __init__(self, message: str, *, field: str | None = None, value: Any = None, path: Any = None) -> None:
        super().__init__(message)
        self.field = field
        self.value = value
        self.path = None if path is None else str(path)


class EarlyExitConfigError(EarlyExitError):
    """A model configuration that cannot work."""


class PolicyError(EarlyExitError):
    """An exit policy with impossible numbers, or one that cannot serve a problem type."""


class CalibrationError(EarlyExitError):
    """Thresholds that cannot be chosen from the rows at hand."""


class CheckpointError(EarlyExitError):
    """A saved folder or file that is incomplete or does not fit."""


class DataError(EarlyExitError):
    """Rows, labels or inputs that cannot be used."""


class TrainingError(EarlyExitError):
    """A training run that cannot go on."""


class UnknownNameError(EarlyExitError):
    """A name that no registry holds."""


class UsageError(EarlyExitError):
    """A call that contradicts itself or comes too early."""


class PermitsEverything(UserWarning):
    """A target that gives all of the full model's quality away; on the command line it is an error.

    Args:
        message: what the target permits.
        instead: words of the target that was probably meant.
    """

    def __init__(self, message: str, instead: str) -> None:
        super().__init__(message)
        self.instead = instead

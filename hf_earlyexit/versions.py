"""Which packages are installed, and which releases of transformers this release was tested with."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

NEWEST_TRANSFORMERS = (5, 24)  # major and minor, of constraints/locked.txt; `make test-newest` tells when it may rise


def installed_version(package: str) -> str | None:
    """The version of a package, by its name for pip; `None` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def warn_if_untested() -> None:
    """Warn of an installed transformers of a newer minor release than any that was tested; reads its metadata only."""
    installed = installed_version("transformers")
    numbers = None if installed is None else re.match(r"(\d+)\.(\d+)", installed)  # whoever needs it will be told
    if numbers and tuple(map(int, numbers.groups())) > NEWEST_TRANSFORMERS:
        tested = ".".join(map(str, NEWEST_TRANSFORMERS))
        warnings.warn(
            f"transformers {installed} is newer than {tested}, the newest that hf_earlyexit was tested with; "
            f'if something fails, install "transformers<{NEWEST_TRANSFORMERS[0]}.{NEWEST_TRANSFORMERS[1] + 1}".',
            UserWarning,
            stacklevel=3,
        )

"""Work that is counted, not timed: a machine that is busy counts the same."""

import sys
from collections import Counter


def calls(work, *files) -> Counter:
    """Python functions that `work` calls, by name, of files whose path holds one of some words."""
    seen = Counter()

    def hear(frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and any(word in path for word in files):
            seen[f"{path.rpartition('/')[2]}:{frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(hear)
    try:
        work()
    finally:
        sys.setprofile(before)
    return seen

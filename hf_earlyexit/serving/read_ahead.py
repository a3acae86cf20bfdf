"""Windows of rows, one more of which may be read while one is answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

Encode = Callable[[Sequence[Any], int], list[Any]]


def windows_read(
    windows: Iterable[Sequence[Any]], encode: Encode, ahead: bool
) -> Iterator[tuple[int, Sequence[Any], Callable[[], list[Any]]]]:
    """The number of each window's first row, the window, and what gives that which the model reads of its rows.

    Args:
        windows: of rows.
        encode: gives what the model reads of the rows of a window, whose first row has this number.
        ahead: read the rows of one window more in a thread while a window is answered.
    """
    first = 0
    if not ahead:
        for window in windows:
            yield first, window, partial(encode, window, first)
            first += len(window)
        return
    waiting: deque[tuple[int, Sequence[Any], Callable[[], list[Any]]]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="hf_earlyexit reader")
    try:
        for window in windows:
            waiting.append((first, window, pool.submit(encode, window, first).result))
            first += len(window)
            if len(waiting) > 1:
                yield waiting.popleft()
    except Exception:  # rows that came before what cannot be read have their answers
        yield from waiting
        raise
    else:
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)  # what nobody has asked for, as after a deadline, is not waited for

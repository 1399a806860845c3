"""Working ahead: results in order, while a small pool of threads already computes the next ones."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS = 8


def in_order(function: Callable[[Item], Result], items: Iterable[Item], depth: int) -> Generator[Result, None, None]:
    """``function`` of each item, in order, with at most ``depth`` items begun and not yet handed out.

    Meant for functions that release the interpreter lock, such as image decoding. What a call
    raises is raised where its result is due. When the consumer stops early the threads are gone
    before this generator is closed.
    """
    workers = min(MOST_WORKERS, os.cpu_count() or 1, depth)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="bntools-ahead")
    source = iter(items)
    begun: deque[Future[Result]] = deque()
    try:
        begun.extend(pool.submit(function, item) for item in islice(source, depth))
        while begun:
            result = begun.popleft().result()
            begun.extend(pool.submit(function, item) for item in islice(source, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

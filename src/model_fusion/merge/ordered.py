"""A function over many tensors in threads, results in order, few of them in memory at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered(function: Callable[[Item], Result], items: Iterable[Item], threads: int = 0) -> Iterator[Result]:
    """`function` of every item, in the items' order; at most 2 × threads results wait. 0 threads: one per core.

    Each thread works with one intra-op thread, so that results do not depend on the machine's cores.
    """
    count = threads or torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[Result]] = deque()

    def guarded(item: Item) -> Result:
        with torch.inference_mode():
            return function(item)

    try:
        for item in items:
            waiting.append(pool.submit(guarded, item))
            if len(waiting) >= 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

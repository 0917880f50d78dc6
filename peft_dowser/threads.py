"""Work on many modules, on as many threads as torch uses."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# Parts of the items for each thread: few, for each costs about as much as hashing 20 kB, but enough to share the work.
_PARTS = 4


def side_by_side(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Call a function for every item.

    Args:
        work: lets go of the interpreter for most of its time, as hashing and numpy do, and uses no threads of torch.
        items: what it is called for.

    Returns:
        The results, in the order of the items. Where calls fail, the exception of the first item that did is raised.
    """
    number = torch.get_num_threads()
    size = max(1, -(-len(items) // (_PARTS * number)))
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(number) as threads:
        return [result for part in threads.map(lambda part: [work(item) for item in part], parts) for result in part]

"""The cases of tests that many share, and which of a large product always run; the others are slow."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, get_args

import pytest

from peft_dowser.delta.layout import Granularity

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def pairwise(cases: Sequence[tuple]) -> list[Any]:
    """The cases; those that are not needed to meet every pair of choices are marked slow."""
    pairs = [set(combinations(((place, repr(choice)) for place, choice in enumerate(case)), 2)) for case in cases]
    missing, kept = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))
        kept.add(best)
        missing -= pairs[best]
    marks = [() if number in kept else pytest.mark.slow for number in range(len(cases))]
    return [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)]

"""The heap of deadlines, beside Python's own."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcore._deadlines import Deadlines

NEVER = (1 << 63) - 1


@given(st.lists(st.none() | st.integers(0, 20) | st.just(NEVER), max_size=200))
def test_it_is_a_heap(steps: list[int | None]) -> None:
    """A number is pushed; None takes the first one out."""
    deadlines, reference = Deadlines(), []
    for number, step in enumerate(steps):
        if step is not None:
            deadlines.push(step, number)
            heapq.heappush(reference, (step, number))
        elif reference:
            deadlines.pop()
            heapq.heappop(reference)
        assert len(deadlines) == len(reference)
        assert deadlines.first == (reference[0] if reference else None)
    while reference:
        assert deadlines.first == heapq.heappop(reference)
        deadlines.pop()
    assert deadlines.first is None


def test_nothing_to_take_out() -> None:
    with pytest.raises(IndexError, match="no deadline"):
        Deadlines().pop()

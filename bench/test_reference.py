"""What the machine takes for something that is not zmqcore: the others are compared as multiples of it.

A neighbour, or a slower clock, changes these as it changes the others; a change of zmqcore does not.
"""

from __future__ import annotations

import json

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

RECORD = {"id": 7, "name": "bench", "tags": ["a", "b"], "shares": [0.5, 0.25, 0.25]}


@pytest.mark.benchmark(group="reference")
def test_interpreter(benchmark: BenchmarkFixture) -> None:
    """Calls, objects and memory, in this process: what there is most of in zmqcore without I/O."""

    def work() -> int:
        made = [dict(RECORD, id=number) for number in range(10)]
        return len(json.loads(json.dumps(made)))

    assert benchmark(work) == 10

"""Send pictures to the tracker, up to three of them on the way at a time."""

from collections import deque

import numpy as np

from zmqcore import Client

IN_FLIGHT = 3
HEIGHT, WIDTH = 720, 1280


def frames(count):
    """A lamp that moves to the right across a grey wall."""
    for number in range(count):
        frame = np.full((HEIGHT, WIDTH, 3), 96, np.uint8)
        frame[300:320, 80 * number : 80 * number + 20] = 255
        yield frame


def show(future):
    found = future.result()
    bar = " " * (found["column"] // 32) + "*"
    print(f"{bar:<40}| row {found['row']}, thumbnail {found['thumbnail'].shape}")


tracker = Client("tracker", timeout=10.0)
under_way = deque()
for frame in frames(6):
    if len(under_way) == IN_FLIGHT:
        show(under_way.popleft())
    # The array is sent from where it is: it must not change before the result is there. Each frame is a new one.
    under_way.append(tracker.submit("find", frame))
while under_way:
    show(under_way.popleft())

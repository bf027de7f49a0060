"""How the benchmarks time."""

import time
from collections.abc import Callable


def best_ms(function: Callable[[], object], repetitions: int = 20) -> float:
    """Milliseconds of the fastest of `repetitions` calls after two that are not counted."""
    function(), function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3

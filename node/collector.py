"""Python's cycle collector, set for a process that holds much and makes little garbage in cycles.

By default it looks at the young objects after every 700 allocations, and at all objects every so often; a Coordinator's books of Islands,
keys and answers are then walked again and again for nothing. Reference counts free nearly everything as before.
"""

from __future__ import annotations

import gc

YOUNG_MAX = 20_000  # allocations between two looks at the young ones: some MB
_GENERATIONS = (50, 100)


def set_for_long_service() -> None:
    """Once, when all is loaded: what is there now is never looked at again, and what comes is more seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_MAX, *_GENERATIONS)

"""What all tests share: one thread each, and a garbage collector that does not look through all that was imported."""

import gc
import os

# Before torch is imported, and for the processes that tests start: threads only slow tiny models down.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """Each full collection would else go through a million objects of modules."""
    gc.collect()
    gc.freeze()

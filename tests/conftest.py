"""What all tests share: one thread each, no hub, and no garbage collection of all that was imported."""

import gc
import os

# Before torch is imported, and for the processes that tests start: threads only slow tiny models down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test needs it, and without a network each look-up of a name would be tried for a minute and a half.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_finish():
    """Each full collection would else go through a million objects of modules."""
    gc.collect()
    gc.freeze()

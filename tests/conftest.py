import os

# one thread per process, also in those that tests start: threads that wait for each other on shared cores take many
# times longer; set before anything imports torch
os.environ["OMP_NUM_THREADS"] = "1"

from hypothesis import settings

# how long an example takes says nothing about whether the code is right, least of all on a busy machine
settings.register_profile("muvit", deadline=None)
settings.load_profile("muvit")

# no machine fails while tests run: to wait for its disk takes a third of the time of tests that write pyramids. That
# everything is flushed, and in which order, is tested by the calls (test_durable.py)
os.fsync = lambda handle: None


def pytest_collection_modifyitems(items):
    """Begin with the longest test: begun last, it would keep one process busy after the others have ended."""
    items.sort(key=lambda item: item.name != "test_commands_and_snippets_run_as_written")

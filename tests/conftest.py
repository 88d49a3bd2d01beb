"""Prepare a process for tests; the fixtures are in shared_fixtures.py."""

import atexit
import gc
import os
import shutil
import tempfile

import pytest
from scheduling import is_alone

# Before any import of huggingface_hub: no test may reach a network, nor read or fill the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
HF_HOME = os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mxd-tests-")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
# Before the import of torch: a worker of pytest-xdist for each core, and each takes one.
os.environ["OMP_NUM_THREADS"] = "1"
gc.disable()  # until all is imported: a seventh of that time


def pytest_configure(config):
    """Import the fixtures, and torch with them, where tests run: not in the process that hands them to others."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from scheduling import ByFile

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: is_alone(item.nodeid))


def pytest_collection_finish(session):
    """Every training begins with `gc.collect()`, which takes half a second if it looks at all imported modules."""
    gc.collect()
    gc.freeze()
    gc.enable()

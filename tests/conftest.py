import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

# Before any import of huggingface_hub: no test may reach a network, nor read or fill the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
HF_HOME = os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mxd-tests-")
# Before the import of torch: a worker of pytest-xdist for each core, and each takes one.
os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import pytest
import torch
from factories import make_tiny_llama
from text_cases import build_tokenizer
from transformers.utils import logging as transformers_logging

atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Measure coverage, which slows Python code down by half, in the tests of the rooms that it is reported of."""
    tests = Path(__file__).parent
    for item in items:
        measured = item.path.is_relative_to(tests / "modeling_mxd") or item.path.is_relative_to(tests / "trainers")
        if not measured or item.path.name == "test_architectures.py":
            item.add_marker(pytest.mark.no_cover)


def pytest_collection_finish(session):
    """Every training begins with `gc.collect()`, which takes half a second if it looks at all imported modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    return make_tiny_llama()


@pytest.fixture(autouse=True)
def library_verbosity():
    """Undo what commands do to the process: they silence transformers and datasets."""
    yield
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    built = build_tokenizer(bos_token="<s>", eos_token="</s>")
    assert (built.bos_token_id, built.eos_token_id) == (0, 1)
    return built


@pytest.fixture(scope="module")
def bare_tokenizer():
    built = build_tokenizer()
    assert built.bos_token_id is None and built.eos_token_id is None
    return built


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    # newer versions pause for 5 s after each shuffled pass over streamed parquet files
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


@pytest.fixture(scope="session")
def finished():
    """A small decomposition, made by the command: folder, stdout, stderr."""
    from commands import decomposed

    return decomposed()

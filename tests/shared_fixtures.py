"""Fixtures of all tests."""

import functools
import logging
from pathlib import Path

import datasets
import lean_imports  # noqa: F401
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer.main
import typer.testing
from factories import make_tiny_llama
from text_cases import build_tokenizer
from transformers.utils import logging as transformers_logging

from mxd import demo
from mxd.evaluation import plots

DRAW = plots._save
if not torch.cuda.is_available():  # `torch.manual_seed` formats three stack traces, for devices that are not there
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = torch.mtia.manual_seed_all = lambda seed: None
for _logger in logging.root.manager.loggerDict.values():  # pytest gives six handlers to each that does not propagate
    if isinstance(_logger, logging.Logger) and _logger.name.startswith("torch"):
        _logger.propagate = True
# Every call of a Typer app makes its commands anew, in a sixth of a second.
typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)


@pytest.fixture(scope="session", autouse=True)
def short_sample(tmp_path_factory):
    """Excerpts of the sample text: shuffle buffers hold more tokens of the whole than any training here reads."""
    folder = tmp_path_factory.mktemp("sample")
    for split in ("train", "heldout"):
        table = pq.read_table(demo.text_path(split))[:50]
        texts = [text[:1000] for text in table["text"].to_pylist()]
        place = table.column_names.index("text")
        pq.write_table(table.set_column(place, "text", pa.array(texts)), folder / f"{split}.parquet")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "text_path", lambda split: folder / f"{split}.parquet")
        yield


@pytest.fixture(scope="session", autouse=True)
def undrawn_figures():
    """Write empty figures: to draw one takes a second."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "_save", lambda figure, path, *_, **__: Path(path).touch())
        yield


@pytest.fixture
def drawn_figures(monkeypatch):
    """Draw figures in a test of them."""
    monkeypatch.setattr(plots, "_save", DRAW)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama(request):
    """A tiny model; a parameter changes fields of its config."""
    return make_tiny_llama(**getattr(request, "param", {}))


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

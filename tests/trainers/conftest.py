import datasets
import pytest
from text_cases import build_tokenizer


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

import pytest
from scenes import BASE, connected, logits_of, save_decomposition, save_tokenizer, share_base


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path) as server:
        yield server


@pytest.fixture
def base(hub, tiny_llama, tmp_path):
    """The base model's commit on the Hub."""
    return share_base(hub, tiny_llama, tmp_path / "base")


@pytest.fixture
def base_with_tokenizer(hub, base, tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    return hub.repos[BASE].add("main", {**hub.files(BASE), **files}, "tokenizer")


@pytest.fixture
def folder(base, tiny_llama, tmp_path):
    """A decomposition of two layers, as `decompose` leaves it."""
    save_decomposition(tiny_llama, base, tmp_path / "decomposition")
    return tmp_path / "decomposition"


@pytest.fixture
def expected(folder, tiny_llama):
    return logits_of(folder, tiny_llama)

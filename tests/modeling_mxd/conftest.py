import pytest
from doors_cases import decomposition, logits
from factories import word_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mxd.modeling_mxd import MxDModel


@pytest.fixture
def base_folder(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def repo(request, base_folder, tiny_llama, tmp_path):
    """A decomposition's folder as `save_pretrained` leaves it; a parameter changes fields of its config."""
    folder = tmp_path / "repo"
    decomposition(base_folder, tiny_llama, **getattr(request, "param", {})).save_pretrained(folder)
    return folder


@pytest.fixture
def spliced(repo):
    """The model that `AutoModelForCausalLM` loads."""
    return AutoModelForCausalLM.from_pretrained(repo)


@pytest.fixture
def by_hand(repo, base_folder):
    """The model that it should equal: base and decomposition, each loaded by its own class, spliced in memory."""
    base = LlamaForCausalLM.from_pretrained(base_folder)
    with MxDModel.from_pretrained(repo).spliced(base):
        yield base


@pytest.fixture
def expected(by_hand):
    return logits(by_hand)


@pytest.fixture
def repo_with_tokenizer(repo):
    word_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<eos>").save_pretrained(repo)
    return repo

"""A folder in the working directory is not taken for the Hub repo of the same name that a decomposition names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from factories import make_tiny_llama, randomise
from scenes import BASE, IDS, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mxd import build_card, load_base_model, push_decomposition
from mxd.base.base_model import BaseModelError, check_base_model
from mxd.base.pretrained_weights import record_base
from mxd.jobs.decompositions import load_base_and_text, load_decomposition
from mxd.modeling_mxd import MxDConfig, MxDModel

REPO = "user/mxd-tiny"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def commit(base_with_tokenizer):
    return base_with_tokenizer


@pytest.fixture
def decomposition(commit, tiny_llama, folder):
    """Its folder, which names the base at the commit that has a tokenizer."""
    values = json.loads((folder / "config.json").read_text()) | {"base_model_revision": commit}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def hidden(decomposition, tmp_path, monkeypatch):
    """A working directory that has another model in the folder `user/base`; returns that model."""
    monkeypatch.chdir(tmp_path)
    other = randomise(make_tiny_llama(), std=0.1)
    other.save_pretrained("user/base")
    save_tokenizer(Path("user/base"))
    return other


def by_the_door(decomposition):
    return AutoModelForCausalLM.from_pretrained(decomposition).unsplice()


def by_the_door_from_the_hub(decomposition):
    push_decomposition(decomposition, REPO)
    return AutoModelForCausalLM.from_pretrained(REPO).unsplice()


def by_a_command(decomposition):
    model, tokenizer, _ = load_base_and_text(load_decomposition(str(decomposition)), "float32", 8, lambda: None)
    assert tokenizer("word3")["input_ids"] == [3]
    return model


@pytest.mark.parametrize("load", [by_the_door, by_the_door_from_the_hub, by_a_command])
def test_the_commit_is_loaded_not_the_folder(hub, hidden, tiny_llama, decomposition, load):
    model = load(decomposition)
    assert torch.equal(logits(model), logits(tiny_llama)) and not torch.equal(logits(model), logits(hidden))


@pytest.mark.parametrize("load", [by_the_door, by_a_command])
def test_a_commit_that_cannot_be_had_is_an_error(hub, hidden, decomposition, load):
    hub.repos.pop(BASE)
    with pytest.raises((OSError, BaseModelError), match="user/base"):
        load(decomposition)


@pytest.mark.parametrize("name", ["./user/base", "user/../user/base", None], ids=["dot", "two dots", "absolute"])
def test_a_recorded_path_is_a_folder(hub, hidden, decomposition, name):
    values = json.loads((decomposition / "config.json").read_text())
    values |= {"base_model_name_or_path": name or str(Path("user/base").resolve()), "base_model_revision": None}
    (decomposition / "config.json").write_text(json.dumps(values))
    hub.repos.pop(BASE)
    for load in (by_the_door, by_a_command):
        assert torch.equal(logits(load(decomposition)), logits(hidden))


@pytest.mark.parametrize("load", [by_the_door, by_a_command])
def test_without_a_commit_the_folder_is_taken_with_a_warning(hub, hidden, decomposition, monkeypatch, load):
    values = json.loads((decomposition / "config.json").read_text()) | {"base_model_revision": None}
    (decomposition / "config.json").write_text(json.dumps(values))
    warned = []
    monkeypatch.setattr("mxd.modeling_mxd.loading.logger.warning", warned.append)
    assert torch.equal(logits(load(decomposition)), logits(hidden))
    assert str(Path("user/base").resolve()) in warned[0]


def test_what_a_user_types_may_be_a_folder(hub, hidden, decomposition):
    typed = AutoModelForCausalLM.from_pretrained(decomposition, base_model_name_or_path="user/base").unsplice()
    assert torch.equal(logits(typed), logits(hidden))
    assert torch.equal(logits(load_base_model("user/base")[0]), logits(hidden))


def test_a_name_without_a_user(hub, decomposition, tiny_llama, tmp_path, monkeypatch):
    """The form of `gpt2`: the client asks the Hub for it, and not the folder."""
    monkeypatch.chdir(tmp_path)
    make_tiny_llama(hidden_size=32).save_pretrained("gpt2")
    asked = []
    monkeypatch.setattr(
        "mxd.modeling_mxd.loading.snapshot_download",
        lambda name, **how: asked.append((name, how["revision"])) or str(tmp_path / "base"),
    )
    values = json.loads((decomposition / "config.json").read_text())
    values |= {"base_model_name_or_path": "gpt2", "base_model_revision": "a" * 40}
    (decomposition / "config.json").write_text(json.dumps(values))
    assert torch.equal(logits(by_the_door(decomposition)), logits(tiny_llama))
    assert asked == [("gpt2", "a" * 40)]
    check_base_model("gpt2", "a" * 40, pickles=False)
    assert asked[1:] == [("gpt2", "a" * 40)]


def test_a_folder_does_not_hide_the_commit_of_a_decomposition(hub, hidden, decomposition):
    push_decomposition(decomposition, REPO)
    first = hub.repos[REPO].commits[-1]["sha"]
    Path("user").mkdir(exist_ok=True)
    shutil.copytree(decomposition, REPO)
    (Path(REPO) / "config.json").unlink()  # whatever is in it
    assert load_decomposition(f"{REPO}@{first}").config.layers == [0, 2]


def test_card_and_push_name_the_hub_s_model(hub, hidden, decomposition, commit):
    card = build_card(decomposition)
    assert card.data.base_model == BASE and commit in card.text
    push_decomposition(decomposition, REPO)
    pushed = json.loads(hub.files(REPO)["config.json"])
    assert (pushed["base_model_name_or_path"], pushed["base_model_revision"]) == (BASE, commit)
    # The tokenizer is the one of the Hub's model.
    Path("user/base/tokenizer.json").unlink()
    push_decomposition(decomposition, "user/again")
    assert "tokenizer.json" in hub.files("user/again")
    assert AutoTokenizer.from_pretrained("user/again", trust_remote_code=True)("word3")["input_ids"] == [3]


def test_a_folder_is_recorded_by_its_whole_path(hidden):
    model = LlamaForCausalLM.from_pretrained("user/base")
    fresh = MxDModel(MxDConfig(layers=[0], hidden_size=16, num_experts=8, num_experts_per_tok=2))
    record_base(fresh, model)
    assert fresh.config.base_model_name_or_path == str(Path("user/base").resolve())

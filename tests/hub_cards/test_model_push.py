"""`model.push_to_hub` is transformers' own: what it leaves on the Hub loads by both AutoClasses."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from scenes import save_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from mxd.hub_cards import build_card, check_base_id, push_decomposition
from mxd.modeling_mxd import MxDModel

REPO = "user/mxd-tiny"


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 12)[None]).logits


def assert_loads(expected, repo=REPO, **kwargs):
    lm = AutoModelForCausalLM.from_pretrained(repo, **kwargs)
    assert torch.equal(logits(lm), expected)
    assert AutoModel.from_pretrained(repo, **kwargs).config.layers == lm.decomposition.config.layers


@pytest.mark.parametrize("door", [AutoModel, AutoModelForCausalLM])
def test_a_push_carries_config_weights_and_code(hub, folder, expected, door):
    door.from_pretrained(folder).push_to_hub(REPO, private=True, commit_message="mine")
    assert hub.repos[REPO].private and hub.repos[REPO].commits[-1]["title"] == "mine"
    files = hub.files(REPO)
    assert {"config.json", "configuration_mxd.py", "modeling_mxd.py", "layers.py", "surgery.py"} <= files.keys()
    assert json.loads(files["config.json"])["base_model_name_or_path"] == "user/base"
    assert b"mxd: begin" not in files.get("README.md", b"")  # the card is `mxd push`'s
    assert_loads(expected)
    assert_loads(expected, trust_remote_code=True)


def test_a_later_push_of_the_folder_adds_the_card(hub, folder, expected):
    AutoModel.from_pretrained(folder).push_to_hub(REPO)
    push_decomposition(folder, REPO)
    assert b"mxd: begin" in hub.files(REPO)["README.md"]
    assert_loads(expected)


def test_saving_with_a_push(hub, folder, expected, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="org/saved")
    assert (tmp_path / "saved" / "config.json").is_file()
    assert_loads(expected, "org/saved")


def test_with_an_adapter_only_the_adapter_is_pushed(hub, folder):
    from peft import LoraConfig

    push_decomposition(folder, REPO)
    lm = AutoModelForCausalLM.from_pretrained(REPO)
    lm.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    lm.push_to_hub("user/adapter")
    assert "adapter_model.safetensors" in hub.files("user/adapter")
    assert "model.safetensors" not in hub.files("user/adapter")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "names no base model"),
        ("mxd/embedded-default", "is on no Hub"),
        ("/models/llama", "is no Hub id"),
        ("a" * 5000, "is no Hub id"),
    ],
)
def test_a_base_that_others_cannot_load_is_refused(name, message):
    with pytest.raises(ValueError, match=message) as refusal:
        check_base_id(name)
    assert len(str(refusal.value)) < 400
    check_base_id("user/base")
    check_base_id("gpt2")


def unpin_base(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "base_model_revision": None}))


@pytest.mark.usefixtures("base_with_tokenizer")
def test_the_base_s_tokenizer_goes_along_so_that_pipelines_work(hub, folder):
    unpin_base(folder)
    hub.fail("GET", "user/base/resolve/.*/tokenizer.json", status=503)
    push_decomposition(folder, REPO)
    assert len(hub.repos[REPO].commits) == 2
    generate = pipeline("text-generation", REPO)
    assert generate("word2 word3", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("word2 word3")
    assert json.loads(hub.files(REPO)["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    # A tokenizer that is there is left alone.
    own = json.dumps({**json.loads(hub.files(REPO)["tokenizer_config.json"]), "mine": True}).encode()
    HfApi().upload_file(path_or_fileobj=own, path_in_repo="tokenizer_config.json", repo_id=REPO)
    push_decomposition(folder, REPO)
    assert hub.files(REPO)["tokenizer_config.json"] == own
    assert AutoTokenizer.from_pretrained(REPO).vocab_size == 64


def test_a_folder_s_tokenizer_is_pushed_under_the_name_that_older_versions_know(hub, folder):
    save_tokenizer(folder)
    written = (folder / "tokenizer_config.json").read_bytes()
    assert json.loads(written)["tokenizer_class"] == "TokenizersBackend"  # otherwise this is no longer needed
    push_decomposition(folder, REPO)
    pushed = json.loads(hub.files(REPO)["tokenizer_config.json"])
    assert pushed == {**json.loads(written), "tokenizer_class": "PreTrainedTokenizerFast"}
    assert (folder / "tokenizer_config.json").read_bytes() == written
    assert AutoTokenizer.from_pretrained(REPO)("word3")["input_ids"] == [3]


def test_the_card_of_a_base_that_no_causal_class_loads(folder):
    config = MxDModel.from_pretrained(folder).config
    config.base_model_type = "vit"
    config.save_pretrained(folder)
    card = build_card(folder)
    assert card.data.get("pipeline_tag") is None
    assert "AutoModelForCausalLM" not in card.text and "decomposition.spliced(model)" in card.text

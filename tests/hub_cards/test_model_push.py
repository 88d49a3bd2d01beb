"""`push_to_hub` of models: with the library installed its own push, without it what the repo's code can do alone."""

import json
import os

import pytest
import torch
import warm_process
from huggingface_hub import HfApi, ModelCard
from scenes import save_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from mxd.hub_cards import HubError, build_card, push_decomposition
from mxd.modeling_mxd import MxDModel, sharing

REPO = "user/mxd-tiny"


@pytest.fixture
def spliced(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 12)[None]).logits


def assert_both_doors(expected, repo=REPO, **kwargs):
    lm = AutoModelForCausalLM.from_pretrained(repo, **kwargs)
    assert torch.equal(logits(lm), expected)
    assert AutoModel.from_pretrained(repo, **kwargs).config.layers == lm.decomposition.config.layers
    return lm


@pytest.mark.parametrize("door", [AutoModel, AutoModelForCausalLM])
def test_a_push_is_the_library_s(hub, folder, expected, door):
    done = door.from_pretrained(folder).push_to_hub(REPO, private=True, commit_message="mine", tags=["my-tag"])
    assert [commit["title"] for commit in hub.repos[REPO].commits] == ["initial commit", "mine"]
    assert (done.oid, hub.repos[REPO].private) == (hub.repos[REPO].refs["main"], True)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("mxd", "mit")
    assert {"mxd", "my-tag", "mxd-layer-2"} <= set(card.data.tags)
    assert "## Limits" in card.text
    assert_both_doors(expected)


def test_a_passing_fault_is_overcome_and_a_lasting_one_leaves_nothing(hub, spliced, expected):
    hub.fail("POST", "/commit/", status=500, times=10**6)
    with pytest.raises(HubError, match="pushing to user/mxd-tiny"):
        spliced.push_to_hub(REPO)
    assert set(hub.files(REPO)) == {".gitattributes"}
    hub.faults.clear()
    hub.fail("POST", "/commit/", mode="lost")
    spliced.push_to_hub(REPO)
    assert len(hub.repos[REPO].commits) == 2
    assert_both_doors(expected)


def test_branch_pull_request_and_saving_with_a_push(hub, spliced, expected, tmp_path):
    spliced.push_to_hub(REPO, revision="try")
    assert_both_doors(expected, revision="try")
    assert spliced.push_to_hub(REPO, create_pr=True).pr_url.endswith("/discussions/1")
    assert_both_doors(expected, revision="refs/pr/1")
    assert set(hub.files(REPO)) == {".gitattributes"}
    spliced.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="org/saved")
    assert (tmp_path / "saved" / "config.json").is_file()
    assert_both_doors(expected, "org/saved")


def test_a_base_that_is_a_folder_is_refused(hub, spliced, tmp_path):
    spliced.decomposition.config.base_model_name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="is no Hub id"):
        spliced.push_to_hub(REPO)
    assert REPO not in hub.repos


@pytest.mark.usefixtures("base_with_tokenizer")
def test_the_base_s_tokenizer_goes_along_so_that_pipelines_work(hub, folder, spliced):
    spliced.decomposition.config.base_model_revision = None
    spliced.push_to_hub(REPO)
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


def test_a_folder_s_tokenizer_is_pushed_under_the_name_that_older_versions_know(hub, folder, tmp_path):
    save_tokenizer(folder)
    written = (folder / "tokenizer_config.json").read_bytes()
    assert json.loads(written)["tokenizer_class"] == "TokenizersBackend"  # else this needs no mending any more
    push_decomposition(folder, REPO)
    pushed = json.loads(hub.files(REPO)["tokenizer_config.json"])
    assert pushed == {**json.loads(written), "tokenizer_class": "PreTrainedTokenizerFast"}
    assert (folder / "tokenizer_config.json").read_bytes() == written
    assert AutoTokenizer.from_pretrained(REPO)("word3")["input_ids"] == [3]


@pytest.mark.usefixtures("base_with_tokenizer")
def test_the_tokenizer_s_download_is_tried_again(hub, spliced):
    spliced.decomposition.config.base_model_revision = None
    hub.fail("GET", "user/base/resolve/.*/tokenizer.json", status=503)
    spliced.push_to_hub(REPO)
    assert "tokenizer.json" in hub.files(REPO)


def test_with_an_adapter_only_the_adapter_is_pushed(hub, folder, spliced):
    from peft import LoraConfig

    push_decomposition(folder, REPO)
    lm = AutoModelForCausalLM.from_pretrained(REPO)
    lm.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    lm.push_to_hub("user/adapter")
    assert "adapter_model.safetensors" in hub.files("user/adapter")
    assert "model.safetensors" not in hub.files("user/adapter")


WITHOUT = """
import importlib.metadata, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mxd":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
importlib.metadata.entry_points = lambda **_: []
import torch
from transformers import AutoModel, AutoModelForCausalLM
def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 12)[None]).logits
lm = AutoModelForCausalLM.from_pretrained({repo!r}, trust_remote_code=True)
assert type(lm.decomposition).__module__.startswith("transformers_modules")
lm.decomposition.layer(0).output_bias.data.add_(1)
lm.push_to_hub({repo!r}, commit_message="over")
lm.push_to_hub("user/new", private=True, tags=["a: b"])
one = AutoModel.from_pretrained("user/new", layers=[2], trust_remote_code=True)
one.push_to_hub("user/new")
lm.push_to_hub("user/new", revision="branch")
lm.push_to_hub("user/new", create_pr=True)
torch.save([logits(lm)] + [
    logits(AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **how))
    for name, how in (({repo!r}, {{}}), ("user/new", {{"revision": "branch"}}), ("user/new", {{}}))
], {out!r})
"""


def test_without_the_library_a_push_is_complete_too(hub, folder, tmp_path):
    (folder / "evaluation.json").write_text(json.dumps({"layers": {"0": {"nmse": 0.5}}}))
    push_decomposition(folder, REPO)
    readme = hub.files(REPO)["README.md"] + b"\nBy hand.\n"
    HfApi().upload_file(path_or_fileobj=readme, path_in_repo="README.md", repo_id=REPO)
    script = tmp_path / "script.py"
    script.write_text(WITHOUT.format(repo=REPO, out=str(tmp_path / "out.pt")))
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = warm_process.run(script, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    pushed, again, branch, one = torch.load(tmp_path / "out.pt")
    assert torch.equal(again, pushed)
    assert torch.equal(branch, pushed)
    assert not torch.equal(one, pushed)

    assert [commit["title"] for commit in hub.repos[REPO].commits][-1] == "over"
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert "By hand." in card.text
    assert "How faithful it is, is not recorded" in card.text
    assert "## Results" not in card.text
    assert (card.data.eval_results, card.data.license, card.data.mxd["layers"]) == (None, "mit", [0, 2])
    assert "evaluation.json" not in hub.files(REPO)

    new = ModelCard(hub.files("user/new", "branch")["README.md"].decode())
    assert (new.data.base_model, new.data.library_name) == ("user/base", "mxd")
    assert {"a: b", "mxd-layer-0", "mxd-layer-2"} <= set(new.data.tags)
    assert hub.repos["user/new"].private
    assert {name for name in hub.files("user/new") if "safetensors" in name} == {"model.safetensors"}
    assert "model.safetensors.index.json" in hub.files("user/new", "refs/pr/1")
    # A later push with the library replaces what it wrote.
    push_decomposition(folder, "user/new")
    card = ModelCard(hub.files("user/new")["README.md"].decode())
    assert "## Results" in card.text
    assert "is not recorded" not in card.text.split("## How it was made")[0]
    assert len(hub.repos["user/new"].commits) == 6
    MxDModel.from_pretrained("user/new")


def test_saving_with_a_push_takes_the_token_from_one_process(hub, folder, tmp_path, monkeypatch):
    token = os.environ["HF_TOKEN"]
    monkeypatch.delenv("HF_TOKEN")
    decomposition = MxDModel.from_pretrained(folder)
    how = {"push_to_hub": True, "repo_id": REPO, "token": token}
    decomposition.save_pretrained(tmp_path / "other", is_main_process=False, **how)
    assert REPO not in hub.repos
    decomposition.save_pretrained(tmp_path / "main", **how)
    assert "config.json" in hub.files(REPO)


def test_a_push_without_an_evaluation_that_is_there_warns(hub, folder, monkeypatch):
    (folder / "evaluation.json").write_text("{}")
    warnings = []
    monkeypatch.setattr("mxd.modeling_mxd.sharing.logger.warning", warnings.append)
    MxDModel.from_pretrained(folder).push_to_hub(REPO)
    assert "`mxd push` shares a folder" in warnings[0]
    assert "evaluation.json" not in hub.files(REPO)


def test_tags_of_a_card_by_hand_and_of_other_layers(folder):
    config = MxDModel.from_pretrained(folder, layers=[2]).config
    earlier = "---\nlicense: mit\ntags:\n- mine\n- mxd-layer-5\n---\n# By hand\n"
    card = ModelCard(sharing._over(earlier, sharing._card(config, REPO, ["yours"])))
    assert card.data.tags == ["mine", "mxd", "interpretability", "mxd-layer-2", "yours"]
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "text-generation")


def test_cards_of_bases_that_no_causal_class_loads(folder):
    config = MxDModel.from_pretrained(folder).config
    config.base_model_type = "vit"
    config.save_pretrained(folder)
    for card in (ModelCard(sharing._card(config, REPO, [])), build_card(folder)):
        assert card.data.get("pipeline_tag") is None
        assert "AutoModelForCausalLM" not in card.text and "decomposition.spliced(model)" in card.text

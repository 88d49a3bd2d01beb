"""`mxd finetune user/name`: a decomposition that somebody shared is trained on."""

import json

import pytest
from transformers import AutoModelForCausalLM

from mxd import FinetuningOptions, finetune
from mxd.hub_cards import push_decomposition

REPO = "user/mxd-tiny"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts.jsonl"  # a token a document, as the base's tokenizer has it
    path.write_text("".join(json.dumps({"text": f"word{7 * index % 64}"}) + "\n" for index in range(4000)))
    return str(path)


def test_a_shared_decomposition_is_finetuned(hub, base_with_tokenizer, folder, text, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["base_model_revision"] = base_with_tokenizer
    (folder / "config.json").write_text(json.dumps(config))
    training = {"tokens_trained": 7, "text": {"dataset": ["some/text"]}}
    (folder / "evaluation.json").write_text(json.dumps({"layers": {}, "settings": {"training": training}}))
    push_decomposition(folder, REPO)
    results = finetune(
        FinetuningOptions(
            decomposition=REPO,
            tokens=640,
            batch_tokens=64,
            evaluation_tokens=128,
            dataset=[text],
            context_length=32,
            training={"disable_tqdm": True, "calibration_tokens": 64, "statistics_tokens": 64, "use_cpu": True},
            output=str(tmp_path / "finetuned"),
        )
    )
    assert results["settings"]["training"] == training
    (finetuning,) = results["settings"]["finetuning"]
    assert finetuning["decomposition"] == REPO
    assert finetuning["before"]["layers"].keys() == {"0", "2"}
    assert not hub.files(REPO)["evaluation.json"].count(b"finetuning")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned")
    assert model.decomposition.config.base_model_revision == base_with_tokenizer


def test_a_name_that_the_hub_does_not_have(hub, tmp_path):
    options = FinetuningOptions(decomposition="nobody/nothing", output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="'nobody/nothing' is no folder with a decomposition, and: nobody/nothing is"):
        finetune(options)
    assert not (tmp_path / "out").exists()

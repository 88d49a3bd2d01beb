"""`push_to_hub=True`: every push of a training is one commit that both doors load, and a Hub that fails costs none of
the training."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from factories import mxd_model
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForCausalLM

from mxd.hub_cards import HubError
from mxd.modeling_mxd import MxDModel
from mxd.trainers import DistillationArguments, DistillationTrainer

REPO = "user/trained"


@pytest.fixture
def train(hub, base, tiny_llama, tmp_path):
    """A trainer of four steps that saves after each second one."""

    def make(**changes):
        tiny_llama.config._name_or_path = tiny_llama.name_or_path = "user/base"
        decomposition = mxd_model([0, 1], hidden_act="silu", base_model_revision=base)
        rows = Dataset.from_dict({"input_ids": torch.randint(0, 64, (64, 12)).tolist()})
        options = {"push_to_hub": True, "hub_model_id": REPO, "max_steps": 4, "save_steps": 2, "save_total_limit": 1}
        arguments = DistillationArguments(
            str(tmp_path / "run"), use_cpu=True, per_device_train_batch_size=8, disable_tqdm=True,
            calibration_tokens=200, statistics_tokens=200, encoder_init="random", **(options | changes),
        )  # fmt: skip
        return DistillationTrainer(decomposition, tiny_llama, arguments, train_dataset=rows)

    return make


def assert_both_doors(revision):
    mxd = AutoModel.from_pretrained(REPO, revision=revision)
    lm = AutoModelForCausalLM.from_pretrained(REPO, revision=revision)
    assert mxd.config.layers == lm.decomposition.config.layers == [0, 1]
    assert all(torch.equal(value, lm.decomposition.state_dict()[key]) for key, value in mxd.state_dict().items())
    return mxd


def everything(hub):
    """All that was ever sent to the repo, as one text."""
    return "".join(str(commit) for commit in hub.repos[REPO].commits)


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("every_save", [set(), set(), set()]),
        ("all_checkpoints", [{"checkpoint-2"}, {"checkpoint-2", "checkpoint-4"}, {"checkpoint-2", "checkpoint-4"}]),
    ],
)
def test_every_push_is_one_commit_that_both_doors_load(hub, train, tmp_path, strategy, folders):
    trainer = train(hub_strategy=strategy, hub_token=hub.token, hub_always_push=True)
    trainer.train()
    done = trainer.push_to_hub(tags=["mine"])
    commits = hub.repos[REPO].commits[1:]
    assert [{name.split("/")[0] for name in commit["files"] if "/" in name} for commit in commits] == folders
    assert commits[-1]["sha"] == done.oid
    for commit in commits:
        card = ModelCard(commit["files"]["README.md"].decode())
        assert (card.data.base_model, card.data.library_name) == ("user/base", "mxd")
        assert "training_args.bin" not in commit["files"]
        assert_both_doors(commit["sha"])
    assert "mine" in card.data.tags
    final = assert_both_doors("main")
    assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in final.state_dict().items())
    assert str(tmp_path) not in everything(hub)
    assert hub.token not in everything(hub)
    assert not list((tmp_path / "run").glob("_push-*"))


def test_a_pushed_checkpoint_resumes(hub, train, tmp_path):
    train(hub_strategy="checkpoint").train()
    assert {name.split("/")[0] for name in hub.files(REPO) if "/" in name} == {"last-checkpoint"}
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, data in hub.files(REPO).items():
        if name.startswith("last-checkpoint/"):
            (folder / name.split("/")[1]).write_bytes(data)
    trainer = train(max_steps=5, push_to_hub=False)
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 5


def test_private_organisation_and_branch(hub, train):
    trainer = train(hub_model_id="org/trained", hub_private_repo=True, hub_revision="try")
    trainer.train()
    trainer.push_to_hub()
    assert hub.repos["org/trained"].private
    assert set(hub.files("org/trained")) == {".gitattributes"}
    assert "model.safetensors.index.json" in hub.files("org/trained", "try")


def test_a_hub_that_fails_in_training_costs_a_warning(hub, train, tmp_path, caplog):
    trainer = train(hub_always_push=True)
    hub.fail("POST", "/commit/", status=500, times=4)  # the first push, all its attempts
    with caplog.at_level(logging.WARNING, logger="mxd.trainers.hub_pushes"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert [record.message for record in caplog.records if "step 2 was not pushed" in record.message]
    assert [commit["title"] for commit in hub.repos[REPO].commits] == ["initial commit", "Training in progress, step 4"]
    assert_both_doors("main")


def test_a_hub_that_fails_at_the_end_leaves_the_folder_and_says_how_to_push_it(hub, train, tmp_path):
    trainer = train(hub_strategy="end")
    trainer.train()
    hub.fail("POST", "/commit/", status=503, times=10**6)
    with pytest.raises(HubError) as refusal:
        trainer.push_to_hub()
    assert str(refusal.value).endswith(f"to push it later: mxd push {tmp_path / 'run'} {REPO}")
    with pytest.raises(HubError, match=r"to push it later: mxd push .* --revision try$"):
        trainer.push_to_hub(revision="try")
    assert set(hub.files(REPO)) == {".gitattributes"}
    hub.faults.clear()
    MxDModel.from_pretrained(tmp_path / "run")
    trainer.push_to_hub()
    assert_both_doors("main")


def test_a_hub_that_refuses_is_known_before_the_first_step(hub, train, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="token"):
        train()


def test_a_base_that_is_a_folder_is_refused_before_the_first_step(hub, train, tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "local")

    def named_locally(**options):
        trainer = train(push_to_hub=False)
        trainer.model.config.base_model_name_or_path = str(tmp_path / "local")
        trainer.args.hub_base_model = options.get("hub_base_model")
        return trainer

    with pytest.raises(ValueError, match="is no Hub id"):
        named_locally().push_to_hub()
    trainer = named_locally(hub_base_model="user/base")
    trainer.args.hub_model_id = REPO
    trainer.push_to_hub()
    assert json.loads(hub.files(REPO)["config.json"])["base_model_name_or_path"] == "user/base"
    assert str(tmp_path) not in everything(hub)


def test_a_push_without_waiting(hub, train):
    trainer = train(hub_strategy="end")
    trainer.train()
    pushed = trainer.push_to_hub(blocking=False)
    assert pushed.result(timeout=60).oid == hub.repos[REPO].refs["main"]


def test_weights_that_are_not_finite_are_not_pushed(hub, train):
    trainer = train(hub_strategy="end")
    trainer.train()
    trainer.model.layer(0).output_bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        trainer.push_to_hub()
    assert set(hub.files(REPO)) == {".gitattributes"}

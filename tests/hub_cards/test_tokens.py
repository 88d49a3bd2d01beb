"""A token appears nowhere: in no log at its most talkative, no output, no message, no file that is saved or pushed."""

import logging
import re
import traceback
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from factories import mxd_model
from faults import command
from huggingface_hub import constants
from transformers import AutoModel, AutoModelForCausalLM

from mxd.hub_cards import HubError, push_decomposition
from mxd.trainers import DistillationArguments, DistillationTrainer, FinetuningArguments, FinetuningTrainer

REPO = "user/mxd-tiny"
TOKEN = "hf_QxZtokenThatNobodyMayReadAnywhere"
STEPS = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
PUSHES = {"push_to_hub": True, "hub_token": TOKEN, "hub_strategy": "all_checkpoints", "hub_always_push": True}


class Told(logging.Handler):
    """Everything that was logged, with tracebacks and what the records were made of."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.lines = []

    def emit(self, record):
        self.lines.append(f"{self.format(record)} {record.args!r}")

    def __str__(self):
        return "\n".join(self.lines)


@pytest.fixture
def told(monkeypatch):
    """All loggers at DEBUG, heard where they do not propagate too."""
    handler = Told()
    named = ("huggingface_hub", "httpx", "httpcore", "urllib3", "transformers", "datasets", "peft", "accelerate", "mxd")
    ours = ("modeling_mxd", "hub_cards", "trainers", "evaluation_mxd")
    loggers = [logging.getLogger(), *map(logging.getLogger, (*named, *ours))]
    loggers += [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    for logger in dict.fromkeys(loggers):
        monkeypatch.setattr(logger, "level", logging.DEBUG)
        monkeypatch.setattr(logger, "disabled", False)
        if logger is logging.getLogger() or not logger.propagate:
            monkeypatch.setattr(logger, "handlers", [*logger.handlers, handler])
    logging.Logger.manager._clear_cache()
    yield handler
    logging.Logger.manager._clear_cache()


@pytest.fixture
def secret(hub, monkeypatch):
    """The Hub knows one token, which only arguments carry."""
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    return hub


@pytest.fixture
def nowhere(told, secret, tmp_path, capfd):
    """Checks at the end that what was done did not leave the token anywhere."""
    yield
    printed = capfd.readouterr()
    assert len(told.lines) > 20
    assert re.search("httpcore", str(told)), "the client was not heard"
    assert TOKEN not in str(told)
    assert TOKEN not in printed.out + printed.err
    for name, repo in secret.repos.items():
        for commit in repo.commits:
            assert TOKEN not in f"{name} {commit['title']} {commit['message']}"
            assert not [path for path, data in commit["files"].items() if TOKEN.encode() in path.encode() + data]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert Path(constants.HF_HUB_CACHE).is_relative_to(tmp_path)  # the cache is among them
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]


def message_of(error):
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.usefixtures("nowhere")
def test_pushes_and_pulls(secret, folder, monkeypatch):
    push_decomposition(folder, REPO, private=True, token=TOKEN)
    for door in (AutoModel, AutoModelForCausalLM):
        model = door.from_pretrained(REPO, token=TOKEN)
        model.push_to_hub("user/again", private=True, token=TOKEN)
        assert TOKEN not in repr(model.config) + str(model.config.to_dict())
        assert TOKEN not in str(vars(model))
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # as a person is logged in
    for arguments in (("push", folder, "user/by-command"), ("show", REPO), ("search", "mxd")):
        code, printed = command(*arguments)
        assert code == 0, printed
        assert TOKEN not in printed


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("fault", [{"status": 401}, {"status": 403}, {"status": 500}, {"mode": "drop"}], ids=str)
def test_what_the_hub_refuses(secret, folder, monkeypatch, fault):
    push_decomposition(folder, "user/there", private=True, token=TOKEN)
    secret.fail("POST", "/commit/", times=10**6, **fault)
    secret.fail("*", "user/there/resolve", times=10**6, **fault)
    with pytest.raises(HubError) as refusal:
        push_decomposition(folder, REPO, token=TOKEN)
    assert TOKEN not in message_of(refusal.value)
    with pytest.raises(Exception) as refusal:  # of whichever library
        AutoModelForCausalLM.from_pretrained("user/there", token=TOKEN)
    assert TOKEN not in message_of(refusal.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, printed = command("push", folder, REPO)
    assert code == 1
    assert TOKEN not in printed


def rows():
    return Dataset.from_dict({"input_ids": torch.randint(0, 64, (32, 12)).tolist()})


def assert_pushed(trainer, hub, folder):
    trainer.train()
    trainer.push_to_hub()
    assert any(name.startswith("checkpoint-1/") for name in hub.files(trainer.hub_model_id))
    assert (folder / "checkpoint-2" / "training_arguments.json").is_file()
    shown = f"{trainer.args} {trainer.args!r} {trainer.args.to_json_string()} {trainer.args.to_sanitized_dict()}"
    assert TOKEN not in shown
    hub.fail("POST", "/commit/", status=403, times=10**6)
    with pytest.raises(HubError) as refusal:
        trainer.push_to_hub()
    assert TOKEN not in message_of(refusal.value)


@pytest.mark.usefixtures("nowhere")
def test_a_distillation(secret, base, tiny_llama, tmp_path):
    tiny_llama.config._name_or_path = tiny_llama.name_or_path = "user/base"
    decomposition = mxd_model([0], hidden_act="silu", base_model_revision=base)
    arguments = DistillationArguments(
        str(tmp_path / "run"), hub_model_id=REPO, calibration_tokens=200, statistics_tokens=200,
        encoder_init="random", **STEPS, **PUSHES,
    )  # fmt: skip
    trainer = DistillationTrainer(decomposition, tiny_llama, arguments, train_dataset=rows())
    assert_pushed(trainer, secret, tmp_path / "run")


@pytest.mark.usefixtures("nowhere")
def test_a_finetuning(secret, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, token=TOKEN)
    arguments = FinetuningArguments(str(tmp_path / "run"), hub_model_id=REPO, statistics_tokens=200, **STEPS, **PUSHES)
    assert_pushed(FinetuningTrainer(model, arguments, train_dataset=rows()), secret, tmp_path / "run")

"""What tests and tables of sharing start from: a Hub on loopback, with a base model, and a decomposition."""

import sys
import time
from contextlib import contextmanager

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import HubServer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

from mxd.base.pretrained_weights import record_base
from mxd.modeling_mxd import MxDConfig, MxDModel

BASE = "user/base"
IDS = torch.arange(2, 12)[None]


@contextmanager
def connected(folder):
    """The client of this process talks to a Hub on loopback, logged in, with an empty cache, and waits for nothing."""
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        # Code of repos is imported from the folder of its first use, unless that is forgotten.
        patch.setattr(sys, "path", list(sys.path))
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)
        # It keeps the address of its first use.
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        patch.setenv("HF_TOKEN", server.token)
        patch.setattr(time, "sleep", lambda seconds: None)
        yield server


def share_base(hub, model, folder):
    """Put a base model on the Hub; returns its commit."""
    model.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return hub.create(BASE, {**files, "README.md": b"---\nlicense: mit\n---\n# Base\n"})


def save_tokenizer(folder):
    """A tokenizer for the base model: a word for each of its 64 tokens."""
    words = {f"word{index}": index for index in range(64)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0"))).save_pretrained(folder)


def save_decomposition(model, commit, folder):
    """A decomposition of two layers of the base model, as `decompose` leaves it."""
    config = MxDConfig(
        layers=[0, 2],
        hidden_size=16,
        intermediate_size=40,
        num_experts=24,
        num_experts_per_tok=4,
        base_model_name_or_path=BASE,
        base_model_revision=commit,
    )
    decomposition = MxDModel(config)
    for tensor in (*decomposition.parameters(), *decomposition.buffers()):
        nn.init.normal_(tensor, std=0.3)
    record_base(decomposition, model)
    decomposition.save_pretrained(folder)


def logits_of(folder, model):
    """Of the base model with the folder's decomposition spliced in."""
    with MxDModel.from_pretrained(folder).spliced(model), torch.no_grad():
        return model(IDS).logits

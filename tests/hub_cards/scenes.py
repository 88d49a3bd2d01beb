"""A Hub on loopback with a base model, and a decomposition to share on it."""

import sys
import time
from contextlib import contextmanager

import pytest
import torch
from factories import random_mxd_model, word_tokenizer
from huggingface_hub import constants
from loopback_hub import HubServer

from mxd.base.pretrained_weights import record_base
from mxd.modeling_mxd import MxDModel

BASE = "user/base"
IDS = torch.arange(2, 12)[None]


@contextmanager
def connected(folder):
    """Connect this process to a Hub on loopback: logged in, with an empty cache and without waits between attempts."""
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
    """Put a base model on the Hub and return its commit."""
    model.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return hub.create(BASE, {**files, "README.md": b"---\nlicense: mit\n---\n# Base\n"})


def save_tokenizer(folder):
    """Save a tokenizer with a word for each of the base model's 64 tokens."""
    word_tokenizer().save_pretrained(folder)


def save_decomposition(model, commit, folder):
    """Save a decomposition of two layers of the base model, as `decompose` leaves it."""
    base = {"base_model_name_or_path": BASE, "base_model_revision": commit}
    decomposition = random_mxd_model([0, 2], buffers=True, **base)
    record_base(decomposition, model)
    decomposition.save_pretrained(folder)


def logits_of(folder, model):
    """Return the logits of the base model with the folder's decomposition spliced in."""
    with MxDModel.from_pretrained(folder).spliced(model), torch.no_grad():
        return model(IDS).logits

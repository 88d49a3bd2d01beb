import time

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import HubServer
from torch import nn

from modeling_mxd import MxDConfig, MxDModel

BASE = "user/base"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The client of this process talks to a Hub on loopback, logged in, with an empty cache, and waits for nothing."""
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(
            "transformers.utils.hub._hf_api", None, raising=False
        )  # it keeps the address of its first use
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


@pytest.fixture
def base(hub, tiny_llama, tmp_path):
    """The base model's commit on the Hub."""
    tiny_llama.save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    card = b"---\nlicense: mit\n---\n# Base\n"
    return hub.create(BASE, {**files, "README.md": card})


@pytest.fixture
def folder(base, tiny_llama, tmp_path):
    """A decomposition of two layers, as `decompose` leaves it."""
    config = MxDConfig(
        layers=[0, 2],
        hidden_size=16,
        intermediate_size=40,
        num_experts=24,
        num_experts_per_tok=4,
        base_model_name_or_path=BASE,
        base_model_revision=base,
    )
    model = MxDModel(config)
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.normal_(tensor, std=0.3)
    model.record_base(tiny_llama)
    model.save_pretrained(tmp_path / "decomposition")
    return tmp_path / "decomposition"


@pytest.fixture
def expected(folder, tiny_llama):
    with MxDModel.from_pretrained(folder).spliced(tiny_llama), torch.no_grad():
        return tiny_llama(torch.arange(2, 12)[None]).logits

"""A decomposition of a tiny model, whose vocabulary is hostile, with its experts collected on a text of such words."""

from types import SimpleNamespace

import pytest
import torch
from browser import EXECUTABLE, Browser
from explorer_cases import hostile_tokenizer, serving
from factories import make_tiny_llama, random_mxd_model

from mxd.base.pretrained_weights import record_base
from mxd.experts.collecting import collect_experts
from mxd.experts.collection_file import EXPERTS_NAME, save_collection

LAYERS = [0, 2]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The decomposition's folder, and what it was made of."""
    torch.manual_seed(0)
    base_folder, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("explored") / "<b>demo"
    base, tokenizer = make_tiny_llama(), hostile_tokenizer()
    base.save_pretrained(base_folder)
    tokenizer.save_pretrained(base_folder)
    decomposition = random_mxd_model(LAYERS, buffers=True, base_model_name_or_path=str(base_folder))
    record_base(decomposition, base)
    layers = {layer: decomposition.config.layer(layer) for layer in LAYERS}
    directions = {layer: torch.randn(one.num_experts, one.output_size) for layer, one in layers.items()}
    decomposition.set_directions(
        {layer: torch.ones(one.num_experts) for layer, one in layers.items()}, directions, "test"
    )
    decomposition.save_pretrained(folder)
    rows = torch.randint(2, 64, (40, 24))
    domains = {"<i>plays": range(20), "speeches": range(20, 40)}
    collection = collect_experts(
        base, decomposition, [{"input_ids": rows}], domains=domains, directions=directions,
        settings={"dataset": ["/home/somebody/<u>.parquet"], "tokens": rows.numel()},
    )  # fmt: skip
    save_collection(collection, folder / EXPERTS_NAME)
    return SimpleNamespace(folder=folder, base=base_folder, collection=collection, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def served(made):
    """The server of the explorer of the decomposition."""
    with serving(made.folder) as server:
        yield server


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    if EXECUTABLE is None:
        pytest.skip("there is no Chromium on this machine")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    """Headless Chromium, in whose console nothing may be reported."""
    chromium.size(1200)
    chromium.errors.clear()
    chromium.requests.clear()
    yield chromium
    assert not chromium.errors

"""Every Python snippet of the README and the docs runs, with fewer tokens and steps, and on the model of the demo.

One that imports TRL, which mxd does not depend on, runs where it is installed, as by `make tasks`.
"""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import mxd_model

from mxd import (
    DistillationArguments,
    ExpertsOptions,
    MxDModel,
    capture_mlps,
    demo,
    export_transcoder,
    load_base_model,
    load_text,
    read_experts,
)

ROOT = Path(__file__).parent.parent
SMOL, GPT2 = "HuggingFaceTB/SmolLM2-135M", "openai-community/gpt2"
BASE = f"base_model_name_or_path={str(demo.model_path())!r}"
SHORT = "tokens=2048, match_transcoder=8, evaluation_tokens=1024"
# page: replacements in its snippets, for speed or since no Hub is at hand
PAGES: dict[str, dict[str, str]] = {
    "README": {
        '"user/mxd-gpt2-l8"': f'"demo-output", {BASE}',
        '"strength": 8': '"strength": 300',  # it is hardly trained
    },
    "docs/start/quickstart": {},
    "docs/how-to/share": {
        'LM.from_pretrained("user/mxd-smollm2-l15"': f'LM.from_pretrained("demo-output", {BASE}',
        "user/mxd-smollm2-l15": "demo-output",
    },
    "docs/how-to/steer": {"3975": "21"},
    "docs/how-to/experts": {"812": "12"},
    "docs/how-to/evaluate": {"_, documents": "documents, _", "corpus/*.parquet": "text.parquet"},
    "docs/how-to/meaning": {
        "100_000": "6_000",
        "range(500)": "range(64)",
        "live(20, 100)": "live(11, 2)",
        "(100, d": "(3, d",
    },
    "docs/how-to/interchange": {SMOL: demo.MODEL_NAME, "{15:": "{2:", "layer(15)": "layer(2)", "index=15": "index=2"},
    "docs/results/speed": {"{15:": "{2:", "[15]": "[2]", "num_groups_per_tok=8": "num_groups_per_tok=2"},
    "docs/how-to/decompose": {f'model="{GPT2}", layers=[8], tokens=1_000_000': f"layers=[2], {SHORT}"},
    "docs/results/faithfulness": {},
    "docs/how-to/compare": {
        "tokens=100_000": SHORT,
        "[8, 32]": "[4]",
        '"mxd", "skip_transcoder"': '"mxd"',
        "tokens=1_000_000": "tokens=2048",
        "context_length=256": "context_length=128",
        "[15]": "[2]",
    },
    "docs/how-to/finetune": {"max_steps=100": "max_steps=2", "max_steps=40": "max_steps=2"},
    "docs/how-to/peft": {"max_steps=100": "max_steps=2"},
}


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / f"{page}.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """A folder with the files that the pages read, and the names that they take as given."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(finished[0], "demo-output")
        read_experts(ExpertsOptions(decomposition="demo-output", tokens=2048, sample=1))
        documents = load_text(str(demo.text_path("heldout"))).select(range(40))
        documents.to_parquet("text.parquet")
        documents.to_json("texts.jsonl")
        sizes = {"layers": [2], "hidden_size": 192, "output_size": 192}
        mxd_model(method="skip_transcoder", **sizes).save_pretrained("skip-transcoder")
        theirs = mxd_model(method="transcoder", **sizes).layer(2)
        export_transcoder(theirs, "their-transcoder", "sae_lens", index=2, model_name=demo.MODEL_NAME)
        yield folder


def given() -> dict[str, Any]:
    """Return the names that pages take as given."""
    first = MxDModel.from_pretrained("demo-output")
    model, tokenizer, _ = load_base_model(demo.MODEL_NAME)
    documents = load_text("texts.jsonl")
    ids = torch.randint(3, 4000, (8, 16))
    form = {"encoder_type": "glu", "hidden_act": "silu", "intermediate_size": 512}
    sizes = {"hidden_size": 192, "output_size": 192, "num_expert_groups": 8, "num_groups_per_tok": 2}
    routed = mxd_model(layers=[2], **form, **sizes)
    return {
        "first": first, "second": first, "mxd": first, "decomposition": routed, "model": model, "base": model,
        "tokenizer": tokenizer, "documents": documents, "input_ids": ids, "batches": [{"input_ids": ids}],
        "x": capture_mlps(model, [2], ids)[2][0],
        "arguments": DistillationArguments(output_dir="runs/cached", max_steps=1, disable_tqdm=True),
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names, printed = given(), []
    for snippet in snippets(page):
        if "from trl" in snippet and find_spec("trl") is None:
            continue
        for old, new in PAGES[page].items():
            snippet = snippet.replace(old, new)  # noqa: PLW2901
        exec(snippet, names)
        printed.append(capsys.readouterr().out)
    check = CHECKS.get(page)
    if check is not None:
        check(names, printed)


def check_readme(names, printed):
    assert names["model"].decomposition.config.layers == [2]
    before, after = printed[1].strip().split("\n")[0], names["steered"]
    assert before.startswith("The President was") and after.startswith("The President was")
    assert before != after


def check_quickstart(names, printed):
    assert float(printed[0].rpartition(" ")[2]) > 0


def check_finetuned(names, printed):
    before = MxDModel.from_pretrained("demo-output").layer(2)
    for name in ("finetuned", "finetuned-by-trl") if find_spec("trl") else ("finetuned",):
        assert not MxDModel.from_pretrained(name).layer(2).modulation.equal(before.modulation)


def check_merged(names, printed):
    before, after = (MxDModel.from_pretrained(name).layer(2) for name in ("demo-output", "merged"))
    assert not after.gate.weight.equal(before.gate.weight) and after.modulation.equal(before.modulation)


CHECKS = {
    "README": check_readme,
    "docs/start/quickstart": check_quickstart,
    "docs/how-to/finetune": check_finetuned,
    "docs/how-to/peft": check_merged,
}


def test_no_page_is_forgotten():
    written = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert {str(page.relative_to(ROOT).with_suffix("")) for page in written if "```python" in page.read_text()} == set(
        PAGES
    )

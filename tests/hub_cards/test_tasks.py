"""Tasks of lm-evaluation-harness: `lm_eval` on a folder or a repo scores as `mxd evaluate --tasks` does in memory."""

import json
import random
import sys

import pytest
from factories import word_tokenizer
from scenes import BASE

from mxd import EvaluationOptions, evaluate
from mxd.evaluation.tasks import find_tasks
from mxd.hub_cards import push_decomposition

REPO = "user/mxd-tiny"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
ENDINGS = """doc_to_text: "{{context}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITES = """doc_to_text: "{{context}}"
doc_to_target: "{{endings[0]}}"
generation_kwargs: {max_gen_toks: 4, do_sample: false, until: ["word9"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list: [{name: first, filter: [{function: take_first}]}]
"""
KINDS = {"multiple_choice": ENDINGS, "loglikelihood_rolling": ROLLING, "generate_until": WRITES}


@pytest.fixture
def tasks(tmp_path, private_cache):
    draw = random.Random(0)
    words = [[f"word{draw.randrange(64)}" for _ in range(12)] for _ in range(6)]
    rows = [{"context": " ".join(row[:8]), "endings": [row[8], " ".join(row[9:])], "label": 1} for row in words]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, task in KINDS.items():
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(name=f"my_{kind}", data=data, kind=kind) + task)
    return [str(tmp_path / f"{kind}.yaml") for kind in KINDS]


@pytest.fixture
def shared(hub, base, folder, tiny_llama, tmp_path):
    """The decomposition's folder, whose base has a tokenizer on the Hub."""
    word_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    config = json.loads((folder / "config.json").read_text())
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    config["base_model_revision"] = hub.repos[BASE].add("main", files, "tokenizer")
    (folder / "config.json").write_text(json.dumps(config))
    word_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", ["folder", "Hub"])
def test_the_harness_scores_a_repo_as_we_do_in_memory(shared, tasks, tmp_path, place, dtype):
    lm_eval = pytest.importorskip("lm_eval")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": " ".join(f"word{n % 64}" for n in range(90))}) + "\n")
    name = str(shared)
    if place == "Hub":
        push_decomposition(shared, REPO)
        name = REPO
    options = EvaluationOptions(
        decomposition=name, dataset=[str(tmp_path / "text.jsonl")], context_length=16, tokens=64, dtype=dtype,
        tasks=tasks, task_limit=5, output=str(tmp_path / "results"),
    )  # fmt: skip
    results = evaluate(options)
    arguments = {"pretrained": name, "trust_remote_code": True, "dtype": dtype}
    how = {"tasks": tasks, "task_manager": find_tasks(tasks), "limit": 5, "device": "cpu", "log_samples": False}
    found = lm_eval.simple_evaluate("hf", arguments, **how)["results"]
    assert {task: set(row) for task, row in results["tasks"].items()} == {
        "my_multiple_choice": {"acc"},
        "my_loglikelihood_rolling": {"word_perplexity", "bits_per_byte"},
        "my_generate_until": {"exact_match,first"},
    }
    for task, metrics in results["tasks"].items():
        for metric, row in metrics.items():
            assert row["spliced"] == found[task][metric if "," in metric else f"{metric},none"]
    row = results["tasks"]["my_loglikelihood_rolling"]["bits_per_byte"]
    assert dtype != "float32" or row["spliced"] != row["untouched"]
    assert results["settings"]["tasks"]["limit"] == 5


def test_what_is_no_task_is_refused_before_anything_is_loaded(tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match=r"knows no task 'no_such_task'.*lm_eval ls tasks.*YAML"):
        find_tasks(["no_such_task"])


def test_without_the_harness_it_says_what_to_install(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'mxd\[tasks\]'"):
        evaluate(EvaluationOptions(decomposition=str(folder), tasks=["lambada_openai"]))

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from typer.main import get_command

from mxd import demo
from mxd.cli.main import app
from mxd.hub_cards import build_card, update_card
from mxd.hub_cards.card import BEGIN, END
from mxd.hub_cards.safe_text import without_folders
from mxd.modeling_mxd import MxDConfig, MxDLayerConfig, MxDModel

LAYER = {
    "nmse": 0.2114,
    "nmse_without_first": 0.212,
    "fvu": 0.301,
    "fvu_without_first": 0.302,
    "expert_share": 0.9012,
    "specialised_share": 0.8888,
    "l0": 4.0,
    "dead_experts": 0.029,
    "expert_entropy": 0.9,
    "max_expert_frequency": 0.2,
    "frequent_experts": 0,
}
EVALUATION = {
    "layers": {"4": LAYER, "5": {**LAYER, "nmse": 0.4321, "fvu": None}, "8": LAYER},
    "cross_entropy": {"untouched": 2.9, "spliced": 2.9135, "zero_ablated": 3.05, "rise": 0.0135, "recovered": 0.909},
    "kl": 0.0123,
    "top1_agreement": 0.955,
    "settings": {
        "tokens": 16384,
        "specialised_frequency": 0.25,
        "dtype": "float32",
        "training": {
            "model": "openai-community/gpt2",
            "revision": None,
            "dtype": "float32",
            "num_experts_per_tok": 4,
            "num_experts": None,
            "match_transcoder": 32,
            "intermediate_size": None,
            "tokens": 1000000,
            "batch_tokens": 2048,
            "evaluation_tokens": 16384,
            "seed": 7,
            "text": {
                "dataset": ["HuggingFaceFW/fineweb-edu", "/home/ann/secret/texts/*.parquet", "wiki/part.jsonl"],
                "heldout_dataset": ["~/secret/held.txt"],
                "config_name": "sample-10BT",
                "split": "train",
                "text_column": "text",
                "streaming": True,
                "context_length": 128,
            },
            "num_groups_per_tok": 8,
            "learning_rate": 0.003,
            "gate_learning_rate_factor": 0.3,
            "modulation_learning_rate_factor": 3.0,
            "gate_init": "data",
            "encoder_init": "pretrained",
            "modulation_init": "unit",
            "scale_activations": True,
            "bf16": True,
            "loss": "squared_norm",
            "tokens_trained": 999424,
            "seconds": 343.2,
            "threads": 2,
            "device": "cuda:0",
            "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        },
        "finetuning": [
            {
                "decomposition": "/home/ann/secret/gpt2-l4",
                "loss": "cross_entropy",
                "nmse_weight": 0.5,
                "dtype": "bfloat16",
                "tokens": 200000,
                "batch_tokens": 1024,
                "evaluation_tokens": 16384,
                "seed": 3,
                "text": {"dataset": ["/home/ann/secret/plays.parquet", "ann/plays"], "context_length": 256},
                "learning_rate": 0.0001,
                "bf16": False,
                "tokens_trained": 199680,
                "seconds": 77.0,
                "device": "cpu",
                "versions": {"torch": "2.13.0+cpu"},
                "before": {"cross_entropy": {"rise": 0.25}, "kl": 0.125},
            }
        ],
    },
}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_experts": 32, "num_experts_per_tok": 4}
HOSTILE = (
    "`x` | y\n```\n---\n<script>alert(1)</script><!-- mxd: end --> [a](javascript:b) ![i](https://evil.example/i.png) "
    "{{ 7 * 7 }}{% raw %} $$z$$ **b** \u202e\x00\ud800 &lt; 'q\" key: value"
)


def write_folder(folder, evaluation=EVALUATION, base="openai-community/gpt2", **changes):
    folder.mkdir(exist_ok=True)
    config = MxDConfig(layers=[4, 5, 8], base_model_name_or_path=base, **{**SIZES, **changes})
    config.save_pretrained(folder)
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def write_figures(folder, *names):
    (folder / "figures").mkdir()
    for name in names:
        (folder / "figures" / name).write_bytes(b"")


def every_text_replaced(value, text):
    if isinstance(value, dict):
        return {key: every_text_replaced(item, text) for key, item in value.items()} | {text: text}
    if isinstance(value, list):
        return [every_text_replaced(item, text) for item in value] + [text]
    return value if isinstance(value, bool) else text


def section(card, title):
    return card.text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def tokens_of(card):
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    return [inner for token in tokens for inner in [token, *(token.children or [])]]


def test_the_results_are_those_of_the_file(tmp_path):
    results = section(build_card(write_folder(tmp_path)), "Results")
    sizes = "| Mixture of Decoders | 32 | 4 | 1,864 |"
    assert f"| 4 {sizes} 0.211 | 90.1 % | 88.9 % | 0.301 | 4.0 | 2.9 % |" in results
    assert f"| 5 {sizes} 0.432 | 90.1 % | 88.9 % | – | 4.0 | 2.9 % |" in results
    assert "| 2.9000 | 2.9135 | 3.0500 | +0.0135 | 90.9 % | 0.0123 | 95.5 % |" in results
    assert "16,384 held-out tokens of held.txt, with the base model in float32." in results
    for name in ("NMSE", "FVU", "L0", "Dead experts", "Expert share", "Specialised share", "Rise", "Recovered"):
        assert f"**{name}**" in results


def test_every_table_has_as_many_cells_as_its_head(tmp_path):
    tables = re.findall(r"(?:^\|.*\|\n)+", build_card(write_folder(tmp_path)).text, flags=re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_rise_has_its_interval_where_there_is_one(tmp_path):
    def shorten(name, interval):
        loss = EVALUATION["cross_entropy"] | {"rise_interval": interval}
        folder = write_folder(tmp_path / name, evaluation=EVALUATION | {"cross_entropy": loss})
        return section(build_card(folder), "Results")

    assert "| +0.0135 ± 0.0012 |" in shorten("measured", [0.0123, 0.0147])
    for index, interval in enumerate(([None, None], None, [0.1], "0.1", ["<b>", 1])):
        assert "| +0.0135 |" in shorten(str(index), interval)


def test_metadata(tmp_path):
    card = build_card(write_folder(tmp_path), repo_id="ann/gpt2-mxd", license="mit")
    metadata = card.data.to_dict()
    assert metadata["base_model"] == "openai-community/gpt2"
    assert metadata["base_model_relation"] == "adapter"
    assert (metadata["library_name"], metadata["pipeline_tag"], metadata["license"]) == (
        "mxd",
        "text-generation",
        "mit",
    )
    layers = ["mxd-layer-4", "mxd-layer-5", "mxd-layer-8"]
    assert metadata["tags"] == ["mxd", "mixture-of-decoders", "interpretability", *layers]
    assert metadata["datasets"] == ["HuggingFaceFW/fineweb-edu", "ann/plays"]
    assert metadata["mxd"] == {
        "layers": [4, 5, 8],
        "method": "mxd",
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "cross_entropy_rise": 0.0135,
    }


def test_without_a_licence_there_is_none(tmp_path):
    card = build_card(write_folder(tmp_path))
    assert "license" not in card.data.to_dict()


def test_yaml_round_trip(tmp_path):
    card = build_card(write_folder(tmp_path), license="mit")
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert str(again) == str(card)


def test_transcoders_are_called_so(tmp_path):
    overrides = {str(layer): {"method": "skip_transcoder"} for layer in (5, 8)}
    card = build_card(write_folder(tmp_path, method="transcoder", layer_overrides=overrides))
    assert {"transcoder", "skip-transcoder"} <= set(card.data.tags)
    assert "mixture-of-decoders" not in card.data.tags
    assert "| 8 | skip transcoder | 32 | 4 | 1,328 |" in section(card, "Results")
    assert "with up to 32 latents, at most 4 of them active per token" in card.text


def test_without_evaluation_nothing_was_measured(tmp_path):
    card = build_card(write_folder(tmp_path, evaluation=None))
    assert "No evaluation comes with these weights" in section(card, "Results")
    assert "not recorded" in section(card, "How it was made")
    assert "held-out" not in card.text
    assert "cross_entropy_rise" not in card.data.mxd


@pytest.mark.parametrize(
    "evaluation",
    [{}, {"layers": 5, "cross_entropy": [], "settings": "x"}, {"layers": {"4": None}, "settings": {"training": {}}}],
)
def test_missing_parts_are_dashes(tmp_path, evaluation):
    card = build_card(write_folder(tmp_path, evaluation=evaluation))
    assert "| 1,864 | – | – | – | – | – | – |" in card.text
    assert "\n| – | – | – | – | – | – | – |" in card.text
    assert "ships with mxd" not in card.text


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "true", '"0.1"', "[1]", "{}", "1" + "0" * 400])
def test_what_is_no_finite_number_is_a_dash(tmp_path, value):
    folder = write_folder(tmp_path)
    text = json.dumps({**EVALUATION, "kl": "X", "layers": {"4": {"nmse": "X", "l0": "X", "dead_experts": "X"}}})
    (folder / "evaluation.json").write_text(text.replace('"X"', value))
    card = build_card(folder)
    assert "| 1,864 | – | – | – | – | – | – |" in card.text
    assert "| 90.9 % | – | 95.5 % |" in card.text


def test_absurd_numbers_stay_short(tmp_path):
    card = build_card(write_folder(tmp_path, evaluation={**EVALUATION, "layers": {"4": {"nmse": 1e300}}}))
    assert "| 1,864 | 1e+300 |" in card.text


def test_hostile_texts_are_only_text(tmp_path):
    evaluation = every_text_replaced(EVALUATION, HOSTILE)
    evaluation["layers"] = {"4": LAYER}
    # Of the names in config.json, those with characters that cannot be printed are refused before.
    base = "".join(character for character in HOSTILE if character.isprintable())
    folder = write_folder(tmp_path, evaluation=evaluation, base=base)
    card = build_card(folder, license=HOSTILE)
    plain = build_card(write_folder(tmp_path / "plain", base="no hub id"), license="mit")
    body = str(card)
    body.encode()
    assert (card.text.count(BEGIN), card.text.count(END)) == (1, 1)
    assert card.text.count("```") == plain.text.count("```")
    assert body.count("\n## ") == str(plain).count("\n## ")
    for part in ("<script", "<img", "{{", "{%", "$$", "\u202e", "\x00"):
        assert part not in card.text
    assert "49" not in section(card, "How it was made")
    found = tokens_of(card)
    assert [token.content.strip() for token in found if token.type.startswith("html")] == [BEGIN, END]
    assert {token.attrs["href"] for token in found if token.type == "link_open"} == {"https://arxiv.org/abs/2505.21364"}
    assert not [token for token in found if token.type == "image"]
    code = "".join(token.content for token in found if token.type == "fence")
    assert set("`<>$&|") & set(code) == set()
    assert ModelCard(body).data.to_dict() == card.data.to_dict()
    assert str(update_card(body, card)) == body


def test_hostile_names_of_files_and_repos_are_left_out_or_refused(tmp_path):
    folder = write_folder(tmp_path / "a`b <i>")
    write_figures(folder, "a](x) ![.png", "loss.png", "loss.svg")
    card = build_card(folder)
    assert re.findall(r"!\[.*", card.text) == ["![Loss](figures/loss.png)"]
    assert "<i>" not in card.text
    with pytest.raises(ValueError, match="Repo id"):
        build_card(folder, repo_id='x"\nimport os')


def test_long_texts_are_cut(tmp_path):
    evaluation = json.loads(json.dumps(EVALUATION))
    evaluation["settings"]["training"]["device"] = "d" * 5000
    assert f"- Device: {'d' * 199}…\n" in build_card(write_folder(tmp_path, evaluation=evaluation)).text


@pytest.mark.parametrize("text", ["[" * 200_000, "{", "[1]", '"text"', "\udcff", " " * 10_000_001 + "{}"])
@pytest.mark.parametrize("name", ["evaluation.json", "config.json"])
def test_an_unreadable_file_is_named(tmp_path, name, text):
    folder = write_folder(tmp_path)
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(name)):
        build_card(folder)


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}, {"model_type": "mxd", "layers": []}])
def test_what_is_no_decomposition_is_refused(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json"):
        build_card(tmp_path)


@pytest.mark.parametrize("base", ["/home/ann/secret/llama", "~/secret/llama", "secret/a/llama", "C:\\secret\\llama"])
def test_no_path_of_the_machine_appears(tmp_path, base):
    card = build_card(write_folder(tmp_path / "mine", base=base))
    assert "base_model" not in card.data.to_dict()
    for part in ("secret", "/home", "~/", str(tmp_path), tmp_path.name, "wiki/"):
        assert part not in str(card)
    assert " MLPs of llama. " in card.text
    assert "HuggingFaceFW/fineweb-edu, &#42;.parquet, part.jsonl" in card.text


LOCAL = [
    "/a/b.txt", "~/a/b.txt", "../a/b.txt", "a/c/b.txt", "a/b.txt", "C:/a/b.txt", "C:\\a\\b.txt", "..\\b.txt",
    "\\\\server\\a\\b.txt", "file:///home/b.txt",
]  # fmt: skip


@pytest.mark.parametrize("path", [*LOCAL, "a/b.py", "a/b.md", "a/b.rst", "a/b.json", "a/B.PARQUET"])
def test_of_paths_in_settings_only_the_last_part_is_kept(path):
    assert without_folders({"text": [path]}) == {"text": [path[path.lower().rindex("b.") :]]}


NAMED = [
    "secret/notes.md", "secret/code.py", "my secret/a/b.txt", "secret/A.PARQUET", "secret/*", "secret/", "./secret/a",
]  # fmt: skip


@pytest.mark.parametrize("path", [*LOCAL, *NAMED])
def test_what_names_data_and_is_no_id_of_the_hub_is_without_its_folders(path):
    kept = {"dataset": [path], "heldout_dataset": [path], "model": path, "decomposition": path}
    kept = without_folders({"training": {"text": kept}, "best_model_checkpoint": path, "base_model_name_or_path": path})
    last = re.split(r"[/\\]", path.rstrip("/"))[-1]
    assert kept["training"]["text"]["dataset"] == [last]
    assert "/" not in json.dumps(kept) and (last == "secret" or "secret" not in json.dumps(kept))


def test_a_folder_that_is_here_is_no_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out/checkpoint-2").mkdir(parents=True)
    assert without_folders({"best_model_checkpoint": "out/checkpoint-2"}) == {"best_model_checkpoint": "checkpoint-2"}


def test_ids_of_the_hub_are_kept_whole():
    names = {"dataset": ["user/data", "wikitext"], "model": "user/gpt2", "decomposition": "user/repo@refs/pr/1"}
    assert without_folders(names) == names


@pytest.mark.parametrize("text", ["HuggingFaceFW/fineweb-edu", "mlp.experts", "training tokens; for layers 1/2: a/b"])
def test_what_is_no_path_is_kept_whole(text):
    assert without_folders(text) == text


def test_a_run_of_too_many_files_has_no_command(tmp_path):
    folder = write_folder(tmp_path / "mine")
    results = json.loads((folder / "evaluation.json").read_text())
    results["settings"]["finetuning"][-1]["text"]["dataset"] = [f"part-{n}.parquet" for n in range(30)]
    (folder / "evaluation.json").write_text(json.dumps(results))
    made = section(build_card(folder), "How it was made").partition("Fine-tuning")[2]
    assert "Tokens trained" in made and "```" not in made


def test_text_that_was_trained_on_is_not_called_held_out(tmp_path):
    folder = write_folder(tmp_path / "mine")
    assert "held-out tokens" in build_card(folder).text
    results = json.loads((folder / "evaluation.json").read_text())
    said = {
        False: "16,384 training tokens (not held out)",
        None: "tokens (it is not known whether they were trained on)",
    }
    for held_out, words in said.items():
        results["settings"]["evaluation"] = {"held_out": held_out}
        (folder / "evaluation.json").write_text(json.dumps(results))
        card = build_card(folder).text
        assert "held-out" not in card and words in card


def test_a_folder_of_the_base_is_no_hub_id_even_where_it_looks_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/llama").mkdir(parents=True)
    folder = write_folder(tmp_path / "mine", base="models/llama")
    assert "base_model" not in build_card(folder).data.to_dict()
    card = build_card(folder, base_model="meta/llama")
    assert card.data.base_model == "meta/llama"
    assert "[meta/llama](https://huggingface.co/meta/llama)" in card.text


def test_figures_are_embedded_by_relative_path(tmp_path):
    folder = write_folder(tmp_path)
    write_figures(folder, "training_loss.png", "expert_frequency.png")
    text = build_card(folder).text
    assert "![Expert frequency](figures/expert_frequency.png)" in text
    assert "![Training loss](figures/training_loss.png)" in text


def options_of(command):
    """Option → its values, of a command as the card prints it; checks that the command takes each."""
    words = shlex.split(command.replace("\\\n", " "))
    names = {parameter.name for parameter in get_command(app).commands[words[1]].params}
    options = {}
    for word in words[3:]:
        if word.startswith("--"):
            name = word.removeprefix("--").replace("-", "_")
            assert name in names
        options.setdefault(name, []).extend([] if word.startswith("--") else [word])
    return words[:3], options


def command_in(made):
    return re.search(r"```sh\n(.*?)```", made, flags=re.DOTALL)[1]


def test_the_command_repeats_the_run(tmp_path):
    made = section(build_card(write_folder(tmp_path)), "How it was made")
    for line in ("Tokens trained: 999,424", "Num groups per tok: 8", "Gate init: data"):
        assert f"- {line}\n" in made
    assert "- Versions: python 3.11.7, torch 2.13.0+cpu, transformers 5.23.0\n" in made
    words, options = options_of(command_in(made))
    assert words == ["mxd", "decompose", "openai-community/gpt2"]
    assert options == {
        "layers": ["4-5,8"],
        "method": ["mxd"],
        "dataset": ["HuggingFaceFW/fineweb-edu", "*.parquet", "part.jsonl"],
        "heldout_dataset": ["held.txt"],
        "dataset_config": ["sample-10BT"],
        "split": ["train"],
        "text_column": ["text"],
        "streaming": [],
        "context_length": ["128"],
        "num_experts_per_tok": ["4"],
        "match_transcoder": ["32"],
        "tokens": ["1000000"],
        "batch_tokens": ["2048"],
        "evaluation_tokens": ["16384"],
        "learning_rate": ["0.003"],
        "dtype": ["float32"],
        "bf16": [],
        "seed": ["7"],
    }


def test_a_fine_tuning_is_told_after_the_training(tmp_path):
    card = build_card(write_folder(tmp_path))
    made = section(card, "How it was made").partition("Fine-tuning in the language model:")[2]
    for line in (
        "Tokens trained: 199,680",
        "Loss: cross_entropy",
        "Cross-entropy rise before: +0.2500",
        "KL divergence before: 0.1250",
    ):
        assert f"- {line}\n" in made
    words, options = options_of(command_in(made))
    assert words == ["mxd", "finetune", "gpt2-l4"]
    assert options == {
        "loss": ["cross_entropy"],
        "dataset": ["plays.parquet", "ann/plays"],
        "context_length": ["256"],
        "tokens": ["200000"],
        "batch_tokens": ["1024"],
        "evaluation_tokens": ["16384"],
        "learning_rate": ["0.0001"],
        "nmse_weight": ["0.5"],
        "dtype": ["bfloat16"],
        "seed": ["3"],
    }
    assert "ann/plays" in card.data.datasets


def test_settings_of_a_trainer_from_python_are_listed(tmp_path):
    folder = write_folder(tmp_path, evaluation=None)
    arguments = {"learning_rate": 0.003, "gate_init": "data", "bf16": True, "logging_dir": "/home/ann/logs"}
    (folder / "training_arguments.json").write_text(json.dumps(arguments))
    made = section(build_card(folder), "How it was made")
    for line in ("Learning rate: 0.003", "Gate init: data", "Bf16: yes"):
        assert f"- {line}\n" in made
    assert "ann" not in made and "```" not in made


def code_of(card):
    return "\n".join(re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL))


def test_the_snippets_run(tmp_path, monkeypatch):
    sizes = {"hidden_size": 192, "output_size": 192, "intermediate_size": 8, "num_experts_per_tok": 2}
    layer = MxDLayerConfig(num_experts=16, hidden_act="silu", encoder_type="glu", **sizes)
    (tmp_path / "base").symlink_to(demo.model_path())
    config = MxDConfig.from_layer_configs({2: layer}, base_model_name_or_path=str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    MxDModel(config).save_pretrained("mine")
    card = build_card("mine")
    assert "base_model" not in card.data.to_dict()
    names: dict[str, object] = {}
    exec(code_of(card), names)
    assert names["indices"].shape == (*names["inputs"]["input_ids"].shape, 2)
    assert torch.isfinite(names["values"]).all()


def test_the_snippet_is_python_for_every_kind_of_base(tmp_path):
    for base, own_tokenizer in (("gpt2", False), ("gpt2", True), ("/models/llama", False), (None, True)):
        folder = write_folder(tmp_path, base=base)
        if own_tokenizer:
            (folder / "tokenizer.json").write_text("{}")
        code = code_of(build_card(folder, "ann/x"))
        compile(code, "snippet", "exec")
        assert 'AutoModelForCausalLM.from_pretrained("ann/x", trust_remote_code=True' in code
        assert ('AutoTokenizer.from_pretrained("ann/x", trust_remote_code=True)' in code) == own_tokenizer
        (folder / "tokenizer.json").unlink(missing_ok=True)


HAND = """---
language: en
license: apache-2.0
tags:
- hand
- mxd-layer-9
extra:
  date: 2024-01-02
  note: "yes"
model-index: of another time
---

# My own title

Words before, with \\1 and \\g<0>.

MARKS

Words after.
"""


def test_an_update_keeps_what_was_written_by_hand(tmp_path):
    folder = write_folder(tmp_path)
    card = build_card(folder)
    updated = update_card(HAND.replace("MARKS", f"{BEGIN}\nold numbers\n{END}"), card)
    before, after = HAND.split("---\n", 2)[2].split("MARKS")
    assert updated.text.startswith(before + BEGIN)
    assert updated.text.endswith(END + after)
    assert "old numbers" not in updated.text
    metadata = updated.data.to_dict()
    assert str(updated).startswith("---\nlanguage: en\nlicense: apache-2.0\ntags:\n- hand\n")
    assert (metadata["language"], metadata["license"]) == ("en", "apache-2.0")
    assert metadata["extra"] == yaml.safe_load("{date: 2024-01-02, note: 'yes'}")
    assert metadata["tags"] == ["hand", *card.data.tags]
    assert {key: metadata[key] for key in card.data.to_dict() if key != "tags"} == {
        key: value for key, value in card.data.to_dict().items() if key != "tags"
    }
    assert str(update_card(str(updated), card)) == str(updated)


def test_numbers_of_an_earlier_evaluation_do_not_outlive_it(tmp_path):
    folder = write_folder(tmp_path)
    earlier = str(build_card(folder))
    (folder / "evaluation.json").unlink()
    card = build_card(folder)
    updated = update_card(earlier, card)
    assert updated.data.mxd == card.data.mxd and "cross_entropy_rise" not in updated.data.mxd
    assert "0.211" not in str(updated)


def test_the_tag_of_an_earlier_method_goes_and_one_by_hand_stays(tmp_path):
    card = build_card(write_folder(tmp_path))
    metadata = {"tags": ["mxd", "transcoder", "mxd-layer-7", "skip-transcoder"], "mxd": {"method": "transcoder"}}
    updated = update_card(f"---\n{yaml.safe_dump(metadata)}---\n", card)
    assert updated.data.tags == ["skip-transcoder", *card.data.tags]


@pytest.mark.parametrize(
    "existing",
    [
        "",
        "# Only text\n\nand a rule\n\n---\n\nend",
        "---\nlicense: mit\n---\n",
        f"# Broken\n\n{BEGIN}\nhalf of the marks",
        f"{END} and {BEGIN}\n",
        "\ufeff---\nlicense: mit\n---\n# A mark of the byte order\n\ntext\n",
    ],
)
def test_a_card_without_marks_is_kept_and_ours_follows(tmp_path, existing):
    card = build_card(write_folder(tmp_path))
    updated = update_card(existing, card)
    existing = existing.removeprefix("\ufeff")
    kept = (existing.split("---\n", 2)[-1] if existing.startswith("---") else existing).strip()
    assert updated.text.strip().startswith(kept)
    assert updated.text.count("## Results") == 1
    assert str(update_card(str(updated), card)) == str(updated)


@pytest.mark.parametrize(
    "front",
    [
        "a: [",
        "- a",
        "!!python/object/apply:os.system [echo]",
        "1: 2",
        "ignore_metadata_errors: true",
        "a: " + "[" * 5000,
    ],
)
def test_earlier_metadata_that_no_card_can_have_is_refused(tmp_path, front):
    card = build_card(write_folder(tmp_path))
    with pytest.raises(ValueError, match=r"metadata of the README"):
        update_card(f"---\n{front}\n---\ntext", card)


def test_only_our_cards_update_others(tmp_path):
    with pytest.raises(ValueError, match="no marks"):
        update_card("text", ModelCard("---\nlicense: mit\n---\n"))

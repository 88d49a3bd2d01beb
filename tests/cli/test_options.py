"""Options: declared once as fields, the same on the command line, in YAML and in Python."""

import json
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
import yaml
from commands import refused, run
from typer.main import get_command

from mxd import DecompositionOptions, DistillationArguments, FinetuningArguments, FinetuningOptions
from mxd.cli.jobs import COMMANDS
from mxd.cli.main import app
from mxd.cli.values import convert, parse_count, parse_numbers, split_files
from mxd.jobs import decompose as decompose_job
from mxd.jobs import evaluate as evaluate_job
from mxd.jobs.options import FrontierOptions
from mxd.jobs.run_folder import write_run


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("480M", 480_000_000),
        ("1.5k", 1500),
        ("2B", 2 * 10**9),
        ("500_000", 500_000),
        ("7", 7),
    ],
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "many", "-5", "0", "1T", "1,5M"])
def test_counts_that_are_none(text):
    with pytest.raises(ValueError):
        parse_count(text)


@pytest.mark.parametrize(("text", "numbers"), [("8", [8]), ("4,8", [4, 8]), ("4-7,10", [4, 5, 6, 7, 10])])
def test_numbers(text, numbers):
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "7-4,10"])
def test_numbers_that_are_none(text):
    with pytest.raises(ValueError):
        parse_numbers(text)


def test_files_that_the_shell_made_of_a_glob(tmp_path, monkeypatch):
    assert split_files(["model", "b.parquet"], ["a.parquet"], []) == (["model"], ["a.parquet", "b.parquet"])
    assert split_files(["gpt2", "B.PARQUET"], ["a.parquet"], []) == (["gpt2"], ["a.parquet", "B.PARQUET"])
    for name in ("b.jsonl.gz", "texts/b.csv.zst", "B.NDJSON", "b.tsv", "b.arrow", "b.log", "b.zip"):
        assert split_files([name, "user/mxd-llama-3.1-8b"], ["a"], []) == (["user/mxd-llama-3.1-8b"], ["a", name])
    monkeypatch.chdir(tmp_path)
    Path("LICENSE").write_text("a text")  # of `--dataset texts/*`
    assert split_files(["LICENSE", "gpt2"], ["a.txt"], []) == (["gpt2"], ["a.txt", "LICENSE"])
    with pytest.raises(typer.BadParameter, match="--dataset"):
        split_files(["a.parquet"], [], [])
    with pytest.raises(typer.BadParameter, match=r"is b\.parquet to be trained on, or held out\? quote"):
        split_files(["model", "b.parquet"], ["train.parquet"], ["a.parquet"])


def commands():
    return get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_a_field_and_has_help(name):
    options = COMMANDS[name].options
    declared = {one.name: one for one in fields(options)}
    for one in declared.values():
        assert one.metadata["help"].strip(), one.name
    parameters = {one.name: one for one in commands()[name].params} | {}
    for parameter in parameters.values():
        assert parameter.help, parameter.name
    on_line = parameters.keys() - {"config", "help", "arguments"}
    assert on_line <= declared.keys()
    for option in on_line:
        names = parameters[option].opts
        assert f"--{option.replace('_', '-')}" in names or "argument" in declared[option].metadata
    # A field without a flag can be set in YAML.
    hidden = {one.name for one in declared.values() if not one.metadata.get("flag", True)}
    assert not hidden & on_line and hidden | on_line | set(getattr(options, "yaml_only", ())) | {
        one.name for one in declared.values() if "argument" in one.metadata
    } == set(declared)


def test_there_are_few_options():
    counts = {
        name: sum(one.param_type_name == "option" and one.name not in ("config", "help") for one in command.params)
        for name, command in commands().items()
    }
    assert counts["decompose"] <= 31 and sum(counts.values()) <= 11 * len(counts), counts


def test_defaults_of_trainer_arguments_are_the_trainer_s():
    for options, arguments in (
        (DecompositionOptions(), DistillationArguments),
        (FinetuningOptions(decomposition="d"), FinetuningArguments),
    ):
        defaults = {one.name: one.default for one in fields(arguments)}
        for name, value in options.trainer_arguments().items():
            assert value == defaults[name] or defaults[name] is MISSING, name


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("tokens", "1M", 1_000_000),
        ("tokens", 500, 500),
        ("layers", "4-7,10", [4, 5, 6, 7, 10]),
        ("layers", [4, "6-7"], [4, 6, 7]),
        ("layers", 8, [8]),
        ("layers", "all", "all"),
        ("layers", None, None),
        ("dataset", "a.txt", ["a.txt"]),
        ("method", "skip-transcoder", "skip_transcoder"),
        ("learning_rate", "1e-4", 1e-4),
        ("streaming", True, True),
        ("training", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
    ],
)
def test_values_are_read_as_users_write_them(name, value, expected):
    field = DecompositionOptions.__dataclass_fields__[name]
    assert convert(field, get_type_hints(DecompositionOptions)[name], value) == expected


@pytest.mark.parametrize(("name", "words"), [("layers", ", or all"), ("num_experts_per_tok", "")])
@pytest.mark.parametrize("value", ["every", ["all"], "all,3"])
def test_a_message_names_the_words_that_are_no_numbers(name, words, value):
    options = DecompositionOptions if words else FrontierOptions
    with pytest.raises(ValueError, match=rf"is no list of numbers: write 8, 4,8 or 4-7{words}$"):
        convert(options.__dataclass_fields__[name], get_type_hints(options)[name], value)


@pytest.fixture
def asked(monkeypatch):
    """Options with which decompose is called, instead of doing its job."""
    found = []

    def stop(options):
        found.append(options)
        raise ValueError("far enough")

    monkeypatch.setattr(decompose_job, "decompose", stop)
    return found


def test_a_config_sets_options_and_the_command_line_wins(asked, tmp_path):
    config = tmp_path / "run.yaml"
    content = {"model": "gpt2", "tokens": "2M", "layers": "4-6", "intermediate_size": 64, "training": {"seed": 7}}
    config.write_text(yaml.safe_dump({**content, "dataset": ["a.parquet"], "streaming": True}))
    run("decompose", "--config", config, "--tokens", "3k", "b.parquet", "--dataset", "c.parquet")
    (options,) = asked
    assert (options.model, options.tokens, options.layers) == ("gpt2", 3000, [4, 5, 6])
    assert options.dataset == ["c.parquet", "b.parquet"] and options.streaming
    assert options.intermediate_size == 64 and options.training == {"seed": 7}


def test_run_yaml_repeats_a_run(asked, tmp_path):
    run("decompose", "gpt2", "--dataset", "a.parquet", "-k", "8", "--tokens", "1M", "--layers", "1,3", "--bf16")
    write_run(tmp_path, "decompose", asked[0])
    run("decompose", "--config", tmp_path / "run.yaml")
    assert asked[1] == asked[0]
    run("decompose", "--config", tmp_path / "run.yaml", "--output", "other")
    assert (asked[2].output, asked[2].layers) == ("other", [1, 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("experts: 4\nnonsense: 1", "sets experts, nonsense, which is no option of this command"),
        ("tokens: many", "tokens: 'many' is no number of tokens"),
        ("layers: {a: 1}", "is no list of numbers"),
        ("streaming: often", "streaming: 'often' is neither true nor false"),
        ("num_experts: 1.5", "is no whole number"),
        ("batch_tokens: 0", "0 is less than 1"),
        ("training: 5", "is no mapping of names"),
        ("- a\n- b", "must hold names of options"),
        ("a: [", "cannot be read as YAML"),
        (None, "cannot be read as YAML"),
    ],
)
def test_a_wrong_config_is_refused_by_name(monkeypatch, capsys, asked, tmp_path, content, message):
    config = tmp_path / "run.yaml"
    if content is not None:
        config.write_text(content)
    error = refused(monkeypatch, capsys, "decompose", "--config", config)
    assert message in " ".join(error.replace("│", " ").split()) and not asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "FOLDER is missing"),
        (["probe", "mine", "--dataset", "a.csv"], "--label-column is missing"),
        (["decompose", "gpt2", "gpt3"], "one model is expected, got gpt2 and gpt3"),
        (["decompose", "--method", "sae"], "'sae' is not one of mxd, transcoder, skip_transcoder"),
        (["push", "mine"], "USER/NAME is missing"),
    ],
)
def test_a_wrong_command_line_is_one_message(monkeypatch, capsys, arguments, message):
    assert message in " ".join(refused(monkeypatch, capsys, *arguments).replace("│", " ").split())


def test_json_on_screen_has_no_nan_and_nothing_else(monkeypatch):
    found = {"kl": float("nan"), "layers": {4: [float("inf"), 0.5]}}
    monkeypatch.setattr(evaluate_job, "evaluate", lambda options: found)
    _, output, _ = run("evaluate", "mine", "--output", "-")
    assert json.loads(output, parse_constant=pytest.fail) == {"kl": None, "layers": {"4": [None, 0.5]}}


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("decompose", "[the model of mxd]"),
        ("decompose", "Tokens of one optimiser step. [2048]"),
        ("push", "[the account's default]"),
        ("evaluate", "(user/repo[@revision])"),
    ],
)
def test_help_shows_what_stands_in_brackets(command, shown):
    code, output, _ = run(command, "--help")
    assert code == 0
    assert shown in " ".join(output.replace("│", " ").split())


def test_help_shows_what_a_newcomer_needs_first():
    _, output, _ = run("decompose", "--help")
    titles = ["What to decompose", "Data", "Training", "Output", "More options"]
    places = [output.index(f" {title} ") for title in titles]
    assert places == sorted(places)
    first = output[places[0] : places[-1]]
    for option in ("--layers", "--num-experts-per-tok", "--dataset", "--tokens", "--learning-rate", "--output"):
        assert option in first


def test_help_needs_no_torch():
    code = (
        "import sys; from mxd.cli.main import app; from typer.testing import CliRunner\n"
        "for words in (['--help'], ['decompose', '--help'], ['--version']):\n"
        "    shown = CliRunner().invoke(app, words)\n"
        "    assert shown.exit_code == 0 and len(shown.output) > 5, shown.output\n"
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "COLUMNS": "200"}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0

"""`mxd steer`: the untouched and the steered text, side by side."""

import json

import pytest
from commands import refused, run

from mxd import SteeringOptions, steer
from mxd.modeling_mxd import MxDModel, Steering

PROMPT = "It was the"


@pytest.fixture(scope="module")
def expert(finished):
    """The strongest expert of the small decomposition."""
    return int(MxDModel.from_pretrained(finished[0]).directions(2).maximum.argmax())


def steered(folder, **changes):
    return steer(SteeringOptions(decomposition=str(folder), prompt=PROMPT, new_tokens=8, **changes))


def test_the_command_shows_both_texts_and_saves_the_steering(finished, expert, tmp_path):
    saved = tmp_path / "formal.json"
    asked = ["--expert", expert, "--strength", "50", "--positions", "1-", "--new-tokens", "8", "--save", saved]
    code, output, error = run("steer", finished[0], PROMPT, *asked)
    assert code == 0, error
    assert "untouched" in output and "steered" in output and output.count(PROMPT) == 2 and "model.steer(" in output
    assert "raise --strength" not in output and error.startswith(f"loading {finished[0]} and its base model")
    (change,) = Steering.from_json(saved)
    assert (change.layer, change.expert, change.strength, change.positions) == (2, expert, 50, [1, None])
    results = steered(finished[0], steering=str(saved))
    assert results["untouched"] != results["steered"]
    assert results == steered(finished[0], expert=expert, strength=50, positions="1-")
    assert results["steering"] == json.loads(saved.read_text())["changes"]


@pytest.mark.parametrize("by", ["direction", "add", "set", "scale", "ablate"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_any_effect_both_texts_are_those_of_one_model(finished, expert, by, temperature):
    """Nothing is steered at positions that no row has."""
    results = steered(finished[0], expert=expert, by=by, positions="500-501", temperature=temperature)
    assert results["prompt"] == PROMPT
    assert results["untouched"] and results["steered"]


def test_a_steering_without_effect_says_what_to_do(finished, expert):
    code, output, error = run("steer", finished[0], PROMPT, "--expert", expert, "--strength", "0", "--new-tokens", "2")
    assert code == 0 and "Both texts are the same: raise --strength" in " ".join(output.split()), error


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "name an --expert, or a file with --steering"),
        (["--expert", "64"], "expert 64 of layer 2; the numbers of experts are layer 2: 64"),
        (["--expert", "3", "--layer", "7"], "expert 3 of layer 7"),
        (["--expert", "3", "--positions", "9-x"], "positions of a steering's change must be all"),
        (["--expert", "3", "--by", "push"], "--by"),
        (["--steering", "gone.json"], "there is no steering gone.json here"),
    ],
    ids=str,
)
def test_what_cannot_be_steered_is_refused(monkeypatch, capsys, finished, asked, message):
    error = refused(monkeypatch, capsys, "steer", finished[0], PROMPT, *asked)
    assert message in " ".join(error.replace("│", " ").split())

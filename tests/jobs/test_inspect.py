import json
import shutil
from functools import partial

import pytest
import torch
from commands import refused, run
from evaluation_cases import decomposition
from reference import dense_coefficients

from mxd import ExpertsOptions, InspectOptions, collect_experts, inspect_text, load_collection
from mxd.base.capture import capture_mlps
from mxd.experts.inspection import inspect_tokens, last_token_outputs


@pytest.mark.parametrize(
    "changes", [{}, {"output_bias": False}, {"method": "transcoder"}, {"method": "skip_transcoder"}]
)
def test_shares_are_those_of_the_output_and_sum_to_one(tiny_llama, changes):
    model, ids = decomposition((0, 1), **changes), torch.randint(2, 64, (9,)).tolist()
    rows = [{"input_ids": torch.randint(2, 64, (8, 9))}]
    collected = collect_experts(tiny_llama, model, rows)
    found = inspect_tokens(tiny_llama, model, ids, {1: collected.layers[1]})
    assert list(found) == [1]
    layer, x = model.layer(1), capture_mlps(tiny_llama, [1], torch.tensor([ids]))[1][0][0]
    dense = dense_coefficients(layer, x).detach()
    for token, (experts, values, shares, bits) in enumerate(zip(*found[1], strict=True)):
        torch.testing.assert_close(values, dense[token, experts])
        left = layer(x[token]).detach() - (0 if layer.output_bias is None else layer.output_bias.detach())
        adds = values[:, None] * layer.expert_table[experts].detach()
        if changes.get("method") is None:
            adds = adds * layer.decoder(layer.hidden(x[token])).detach()
        torch.testing.assert_close(shares, adds @ left / (left @ left), rtol=1e-4, atol=1e-5)
        rest = left - adds.sum(0)  # a skip
        assert shares.sum() + rest @ left / (left @ left) == pytest.approx(1, abs=1e-4)
        most = (torch.tensor(73.0)).log2()
        assert ((bits >= 0) & (bits <= most + 1e-4)).all() and (bits[values == 0] == 0).all()


def test_what_is_rare_and_strong_is_unusual(tiny_llama):
    model, rows = decomposition(), torch.randint(2, 64, (40, 9))
    collected = collect_experts(tiny_llama, model, [{"input_ids": rows}]).layers[1]
    found = inspect_tokens(tiny_llama, model, rows[0].tolist(), {1: collected})[1]
    x = capture_mlps(tiny_llama, [1], rows)[1][0]
    counted = dense_coefficients(model.layer(1), x).detach()[:, 1:].flatten(0, 1)
    for experts, values, bits in zip(found.experts, found.coefficients, found.rarity, strict=True):
        for expert, value, rarity in zip(experts.tolist(), values, bits, strict=True):
            if value > 0:
                exact = (counted[:, expert] >= value).sum()
                assert 2 ** -float(rarity) * 361 - 1 == pytest.approx(float(exact), abs=2 + 0.35 * float(exact))
    order = found.unusual()
    assert list(order.values()) == sorted(order.values(), key=lambda one: -one[0])
    assert all(position > 0 and expert in found.experts[position] for expert, (_, position) in order.items())


@pytest.mark.parametrize("method", ["mxd", "transcoder"])
def test_outputs_at_last_tokens(tiny_llama, method):
    model = decomposition(method=method)
    ids = torch.randint(2, 64, (6,)).tolist()
    layer, x = model.layer(1), capture_mlps(tiny_llama, [1], torch.tensor([ids]))[1][0][0]
    coefficients = layer.encode(x[[3]])
    expert, other = int(coefficients.indices[0, 0]), int(coefficients.indices[0, 1])
    found = last_token_outputs(tiny_llama, model, 1, [(expert, ids[:4]), (other, ids[:4])])
    dense = layer.decoder(layer.hidden(x[3])) if method == "mxd" else 1
    for line, slot in zip(found, (0, 1), strict=True):
        expected = coefficients.values[0, slot] * layer.expert_table[coefficients.indices[0, slot]] * dense
        torch.testing.assert_close(line, expected.detach())


# --- the command


def test_from_a_text_to_its_experts(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    assert run("experts", folder, "--tokens", "2048", "--experts", "1")[0] == 0
    code, output, error = run("inspect", folder, "the people of the <b>States", "--top", "4")
    assert code == 0, error
    assert "people" in output and "bits" in output and "inspect.html" in output and "experts: 100%" not in error
    assert f"loading {folder} and its base model" in error
    page = (folder / "inspect.html").read_text()
    assert page.count("<h2 ") == 4 and "<b>" not in page and "which depends on the token" in page
    results = inspect_text(
        InspectOptions(decomposition=str(folder), texts=["July 4", "May 5, 1821"], output="-", top=2)
    )
    (experts,) = results["experts"].values()
    assert len(results["texts"]) == 2 and len(experts) == 2
    scores = [one["score"] for one in experts.values()]
    assert scores == sorted(scores, reverse=True) and all(one["examples"] for one in experts.values())
    for text in results["texts"]:
        for token in text["layers"]["2"]["tokens"]:
            assert 1 <= len(token["experts"]) <= 4 and sum(one["share"] for one in token["experts"]) == pytest.approx(1)
            bits = [one["rarity"] for one in token["experts"]]
            assert bits == sorted(bits, reverse=True)


def test_without_a_collection_one_is_made(finished, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    (folder / "directions.safetensors").unlink()
    monkeypatch.setattr("mxd.jobs.inspect_text.ExpertsOptions", partial(ExpertsOptions, tokens=1024))
    code, output, error = run("inspect", folder, "a word", "--output", "-")
    assert code == 0, error
    assert json.loads(output)["experts"]["2"] and "they are fitted on the tokens of this text" in caplog.text
    code, output, error = run("inspect", folder, "a word")
    assert code == 0 and load_collection(folder / "experts.safetensors").layers[2].promoted_ids is not None
    assert (folder / "directions.safetensors").is_file()


def test_nothing_to_inspect(finished, monkeypatch, capsys):
    assert "no text to inspect" in refused(monkeypatch, capsys, "inspect", finished[0], " ")
    assert "TEXT... is missing" in refused(monkeypatch, capsys, "inspect", finished[0])
    assert "layer 7 is not in" in refused(monkeypatch, capsys, "inspect", finished[0], "text", "--layer", "7")

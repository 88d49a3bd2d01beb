"""NMSE never stands alone: a low expert share is said in the log, the tables, the card and the frontier."""

import json
import math

import pytest
import torch
from evaluation_cases import approximate, batches, exact

from mxd.cli.jobs import COMMANDS
from mxd.cli.tables import print_evaluation, print_frontier
from mxd.evaluation import faithfulness, recovered_share, save_evaluation
from mxd.evaluation.metrics import weak_experts
from mxd.hub_cards import build_card
from mxd.modeling_mxd import MxDConfig

WARNING = "the dense part does the work"
LAYER = {"nmse": 0.126, "fvu": 0.1, "l0": 4.0, "dead_experts": 0.0, "specialised_share": None}
LOSS = {"untouched": 2.9, "spliced": 2.91, "zero_ablated": 3.05, "recovered": 0.9, "rise_interval": [0.009, 0.011]}


def results(*shares):
    layers = {str(layer): {**LAYER, "expert_share": share} for layer, share in enumerate(shares)}
    return {"layers": layers, "cross_entropy": LOSS, "kl": 0.01, "top1_agreement": 0.9, "settings": {}}


@pytest.mark.parametrize(
    ("share", "weak"),
    [(0.003, True), (0.0, True), (-5.0, True), (0.1999, True), (0.2, False), (0.9, False), (3.0, False),
     (None, False), (math.nan, False)],
)  # fmt: skip
def test_every_place_warns_alike(tmp_path, capsys, share, weak):
    assert (WARNING in weak_experts({"layer 0": {"expert_share": share}})) == weak
    found = results(0.5, share)
    print_evaluation(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert (WARNING in shown) == weak and ("layer 1 (" in shown) == weak and "layer 0 (" not in shown
    point = {"name": "mxd-k4", "method": "mxd", "num_experts_per_tok": 4, **results(share)}
    print_frontier({"untouched": 2.9, "points": [point]})
    shown = " ".join(capsys.readouterr().out.split())
    assert (f"{WARNING}, not the experts" in shown) == weak and ("mxd-k4 (" in shown) == weak
    MxDConfig(layers=[0, 1], num_experts=8, num_experts_per_tok=2).save_pretrained(tmp_path)
    save_evaluation(found, tmp_path)
    assert (f"**Warning**: {WARNING}" in build_card(tmp_path).text) == weak


@pytest.mark.parametrize("command", ["decompose", "evaluate", "finetune"])
def test_what_a_measurement_logged_is_not_printed_again(capsys, command):
    found = results(0.1)
    COMMANDS[command].show({**found, "settings": {"finetuning": [{"before": found}]}})
    shown = capsys.readouterr().out
    assert "NMSE" in shown and WARNING not in " ".join(shown.split())


def test_a_measurement_logs_it(tiny_llama, caplog):
    faithfulness(tiny_llama, exact(tiny_llama, layers=(0, 2)), batches())  # its experts never change
    assert WARNING in caplog.text and "layer 0" in caplog.text and "layer 2" in caplog.text
    caplog.clear()
    mxd = approximate(tiny_llama, (1,))
    if (found := faithfulness(tiny_llama, mxd, batches()))["layers"]["1"]["expert_share"] >= 0.2:
        assert WARNING not in caplog.text
    assert torch.isfinite(torch.tensor(found["layers"]["1"]["nmse"]))


def test_untrusted_shares_in_a_card(tmp_path):
    MxDConfig(layers=[0, 1], num_experts=8, num_experts_per_tok=2).save_pretrained(tmp_path)
    found = results("<script>", -1e308)
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    text = build_card(tmp_path).text
    assert "script" not in text and "layer 1 (-inf %)" in text


@pytest.mark.parametrize("rise", [0.0, 0.001, 0.0099, -0.5])
def test_nothing_is_recovered_where_the_mlps_hardly_matter(rise):
    assert math.isnan(recovered_share(3.0, 3.1, 3.0 + rise))


@pytest.mark.parametrize("rise", [0.0101, 0.06, 1.0])
def test_recovered_where_they_matter(rise):
    assert recovered_share(3.0, 3.0, 3.0 + rise) == 1

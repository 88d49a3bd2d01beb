import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import mxd_config
from matplotlib.figure import Figure

from mxd import evaluation
from mxd.evaluation import (
    plot_ablation,
    plot_domain_use,
    plot_expert_frequency,
    plot_frontier,
    plot_singular_values,
    plot_training_loss,
)
from mxd.evaluation.plots import decomposition_title, model_title
from mxd.modeling_mxd import MxDConfig

pytestmark = pytest.mark.usefixtures("drawn_figures")
PNG = b"\x89PNG\r\n"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def test_histogram_counts_every_living_expert_and_names_the_dead(figures, tmp_path):
    frequency = torch.tensor([0.0, 0.0, 0.001, 0.01, 0.3, 1.0, 0.5, 0.02])
    plot_expert_frequency({"layer 8": frequency, "layer 9": torch.zeros(4)}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    (axes,) = figures[0].axes
    first, second, quarter = axes.get_lines()
    assert (first.get_ydata().sum(), second.get_ydata().sum()) == (6, 0)
    assert list(quarter.get_xdata()) == [0.25, 0.25] and axes.get_xscale() == "log"
    assert legend(figures[0]) == ["layer 8: 25.0 % of 8 dead", "layer 9: 100.0 % of 4 dead", "25 % of tokens"]
    assert axes.get_xlabel() and axes.get_ylabel()


@pytest.mark.parametrize("smallest", [1e-9, 1e-3, 1.0])
def test_no_frequency_falls_off_the_axis(figures, tmp_path, smallest):
    frequency = torch.tensor([smallest, 0.5, 1.0], dtype=torch.bfloat16).requires_grad_()
    plot_expert_frequency({"layer 8": frequency}, tmp_path / "a.png")
    line = figures[0].axes[0].get_lines()[0]
    assert line.get_ydata().sum() == 3
    left, right = figures[0].axes[0].get_xlim()
    assert left <= 1.001 * smallest and right == 1


def test_many_layers_and_none(figures, tmp_path):
    plot_expert_frequency({f"layer {i}": torch.rand(50) for i in range(20)}, tmp_path / "a.png")
    assert len(legend(figures[0])) == 21
    colours = [line.get_color() for line in figures[0].axes[0].get_lines()[:20]]
    assert len(set(colours)) == 20
    plot_expert_frequency({}, tmp_path / "b.svg")
    assert "<svg" in (tmp_path / "b.svg").read_text()


LOG = [
    {"loss": 2.0, "step": 1},
    {"eval_loss": 9.0, "step": 1},
    {"loss": 0.5, "step": 2},
    {"train_runtime": 3.0, "step": 2},
]


def test_loss_over_steps(figures, tmp_path):
    plot_training_loss(LOG, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    (axes,) = figures[0].axes
    (line,) = axes.get_lines()
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[1, 2], [2.0, 0.5]]
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "optimiser steps" and axes.get_ylabel()
    assert not legend(figures[0])


def test_loss_over_tokens_where_all_entries_count_them(figures, tmp_path):
    counted = [{**entry, "num_input_tokens_seen": 100 * entry["step"]} for entry in LOG]
    plot_training_loss(counted, tmp_path / "a.png")
    plot_training_loss([*counted, {"loss": 0.4, "step": 3}], tmp_path / "a.png")
    assert list(figures[0].axes[0].get_lines()[0].get_xdata()) == [100, 200]
    assert figures[0].axes[0].get_xlabel() == "training tokens"
    assert figures[1].axes[0].get_xlabel() == "optimiser steps"


def test_loss_of_every_layer(figures, tmp_path):
    log = [{"loss": 1.5, "layer_2/loss": 1.0, "layer_10/loss": 2.0, "step": step} for step in (1, 2)]
    plot_training_loss(log, tmp_path / "a.png")
    assert legend(figures[0]) == ["layer 2", "layer 10"]
    assert list(figures[0].axes[0].get_lines()[1].get_ydata()) == [2.0, 2.0]


def test_an_empty_log_still_gives_a_figure(tmp_path):
    plot_training_loss([], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_no_global_state_of_matplotlib_is_touched():
    for path in Path(evaluation.__file__).parent.glob("*.py"):
        assert not {"pyplot", "rcParams", "matplotlib.use"} & set(path.read_text().replace(".", " ").split()), path


@pytest.mark.parametrize("values", [[0.0, 0.002, 0.5, 3.0], [0.25, 0.25], [0.0]])
def test_every_singular_value_is_drawn_or_named(figures, tmp_path, values):
    plot_singular_values({"layer 8": torch.tensor(values)}, tmp_path / "a.png")
    (line,) = figures[0].axes[0].get_lines()
    zeros = values.count(0.0)
    assert line.get_ydata().sum() == len(values) - zeros
    assert legend(figures[0]) == [f"layer 8: {len(values)} experts" + (f", {zeros} at 0" if zeros else "")]


def test_ablation_curves_keep_every_point_and_mark_the_ablated_model(figures, tmp_path):
    curve = {"removed": [0, 1, 2, 4], "rise": [0.01, 0.2, 0.5, None], "untouched": 2.0, "zero_ablated": 2.75}
    plot_ablation({"layer 8": curve}, tmp_path / "a.png")
    points, ablated = figures[0].axes[0].get_lines()
    assert list(points.get_xdata()) == [0, 1, 2, 4]
    assert list(points.get_ydata())[:3] == [0.01, 0.2, 0.5]
    assert list(ablated.get_ydata()) == [0.75, 0.75]
    assert legend(figures[0]) == ["layer 8", "layer 8: zero-ablated"]
    assert [tick.get_text() for tick in figures[0].axes[0].get_xticklabels()] == ["0", "1", "2", "4"]


def test_a_bar_for_the_active_and_one_for_the_own_experts_of_every_domain(figures, tmp_path):
    domains = {
        "plays": {"active_experts": 9, "own_experts": {"3": 1.0}},
        "law": {"active_experts": 5, "own_experts": {}},
    }
    plot_domain_use({"layer 8": {"domains": domains, "share": 0.9}}, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [9, 5, 1, 0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["plays", "law"]
    assert legend(figures[0]) == ["layer 8: active there", "layer 8: 90 % of firings there"]


def frontier_point(method, k, spliced, nmse, interval=(0.01, 0.03)):
    loss = {"spliced": spliced, "rise_interval": None if interval is None else list(interval)}
    layers = {"4": {"nmse": nmse, "expert_share": nmse}, "8": {"nmse": nmse and 3 * nmse, "expert_share": nmse}}
    return {"method": method, "num_experts_per_tok": k, "cross_entropy": loss, "layers": layers}


def test_a_frontier_has_a_line_for_each_method_with_bars_and_the_untouched_model(figures, tmp_path):
    points = [
        frontier_point("mxd", 64, 2.01, 0.1), frontier_point("mxd", 16, 2.02, 0.2),
        frontier_point("skip_transcoder", 16, 2.08, 0.3), frontier_point("skip_transcoder", 64, None, None, None),
    ]  # fmt: skip
    plot_frontier({"untouched": 2.0, "points": points}, tmp_path / "a.png")
    loss, error, share = figures[0].axes
    least = "20 % expert share: below, the dense part does the work"
    assert legend(figures[0]) == ["Skip transcoder", "MxD", "Untouched model", least]
    skip, mxd = loss.containers
    assert list(mxd[0].get_xdata()) == pytest.approx([16, 64], rel=0.03)
    assert list(mxd[0].get_ydata()) == [2.02, 2.01]
    assert mxd[2][0].get_segments()[0][:, 1] == pytest.approx([2.01, 2.03])
    assert skip[0].get_ydata()[0] == 2.08 and math.isnan(skip[0].get_ydata()[1])
    (dashed,) = (line for line in loss.get_lines() if line.get_linestyle() == "--")
    assert list(dashed.get_ydata()) == [2.0, 2.0]
    assert list(error.get_lines()[1].get_ydata()) == pytest.approx([0.4, 0.2])
    assert list(share.get_lines()[1].get_ydata()) == pytest.approx([20, 10])
    assert list(share.get_lines()[-1].get_ydata()) == pytest.approx([20, 20])
    assert [tick.get_text() for tick in loss.get_xticklabels()] == ["16", "64"]


def test_a_title_names_the_model_the_layers_and_the_sizes(figures, tmp_path):
    config = mxd_config(layers=(1, 2))
    config.base_model_name_or_path = "somebody/Model-1B"
    title = decomposition_title(config)
    first = config.layer(1)
    assert title == f"Model-1B, layers 1-2: MxD, {first.num_experts} experts, K = {first.num_experts_per_tok}"
    assert model_title("folder/of/model", range(30)) == "model, layers 0-29"
    assert model_title("model", range(0, 30, 2)) == "model, layers 0, 2, 4, 6, …, 28"
    assert model_title(None, [8]) == "model, layer 8"
    plot_training_loss([{"loss": 1.0, "step": 1}], tmp_path / "a.png", title=title)
    assert figures[0].get_suptitle() == title


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_experts": 2000}, "Mixture, layers 0-1, 4: MxD, 24 to 2,000 experts, K = 4"),
        ({"num_experts_per_tok": 2}, "Mixture, layers 0-1, 4: MxD, 24 experts, K = 2 to 4"),
        ({"method": "transcoder"}, "Mixture, layers 0-1, 4: MxD and Transcoder, 24 experts, K = 4"),
    ],
)
def test_a_title_is_of_layers_that_differ(changes, expected):
    sizes = mxd_config(layers=[0]).layer(0)
    layers = {0: sizes, 1: replace(sizes, **changes), 4: sizes}
    config = MxDConfig.from_layer_configs(layers, base_model_name_or_path="somebody/Mixture")
    assert decomposition_title(config) == expected

import copy

import pytest

from mxd.cli.tables import print_evaluation, print_inspection

LAYER = {"nmse": 0.1, "fvu": 0.1, "l0": 4.0, "dead_experts": 0.0, "expert_share": 0.9, "specialised_share": 0.9}
EVALUATION = {
    "layers": {"4": LAYER},
    "cross_entropy": {"untouched": 2.9, "spliced": 2.9081, "zero_ablated": 3.05, "recovered": 0.909},
    "kl": 0.0123,
    "top1_agreement": 0.955,
}


@pytest.fixture
def with_interval():
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["cross_entropy"] |= {"rise": 0.0081, "rise_interval": [0.0069, 0.0093]}
    return evaluation


def test_the_rise_has_its_interval(with_interval, capsys):
    print_evaluation(with_interval)
    assert "+0.0081 ± 0.0012" in capsys.readouterr().out


def test_evaluations_from_before_there_was_one_are_shown(with_interval, capsys):
    print_evaluation(EVALUATION)
    shown = capsys.readouterr().out
    assert "+0.0081" in shown and "±" not in shown
    with_interval["cross_entropy"]["rise_interval"] = [None, None]  # of one row
    print_evaluation(with_interval)
    shown = capsys.readouterr().out
    assert "+0.0081" in shown and "±" not in shown


@pytest.mark.parametrize(
    ("evaluated", "said"),
    [
        ({}, "1,024 tokens of held-out text"),  # by the training itself
        ({"evaluation": {"held_out": True}}, "1,024 tokens of held-out text"),
        ({"evaluation": {"held_out": False}}, "1,024 tokens of text that was trained on"),
        ({"evaluation": {"held_out": None}}, "1,024 tokens of text; it is not known whether it was trained on that"),
    ],
)
def test_the_title_says_on_what_it_was_measured(capsys, evaluated, said):
    evaluation = {**EVALUATION, "settings": {"tokens": 1024, **evaluated}}
    for show in (print_evaluation, lambda results: print_evaluation(results, EVALUATION)):
        show(evaluation)
        assert said in " ".join(capsys.readouterr().out.split())


def test_a_change_of_the_rise(with_interval, capsys):
    print_evaluation(with_interval, EVALUATION)
    assert "+0.0081 → +0.0081 ± 0.0012" in capsys.readouterr().out


def test_what_is_not_finite_is_a_dash(with_interval, capsys):
    diverged = copy.deepcopy(with_interval)
    diverged["cross_entropy"] |= {"spliced": None, "zero_ablated": None, "rise_interval": [None, None]}
    diverged["layers"]["4"]["l0"] = None
    print_evaluation(diverged)
    print_evaluation(diverged, with_interval)
    assert "± 0.0012 → –" in capsys.readouterr().out


def test_scores_of_tasks_stand_side_by_side(with_interval, capsys):
    score = {"untouched": 0.5, "untouched_stderr": 0.0123, "spliced": 0.25, "spliced_stderr": None}
    print_evaluation({**with_interval, "tasks": {"my_task": {"acc": score}}})
    row = next(line for line in capsys.readouterr().out.splitlines() if "my_task" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["my_task", "acc", "0.5000 ± 0.0123", "0.2500"]


def test_each_context_of_an_inspection_is_one_line(capsys):
    examples = [
        {"before": f"the\n\n {one}  KING\n", "token": " pray", "after": " you,\n sir"} for one in ("first", "second")
    ]
    expert = {"score": 9.5, "texts": 2, "alignment": 1.8, "promoted": [], "examples": examples}
    print_inspection({"texts": [], "experts": {"2": {"7": expert}}})
    lines = [line.rsplit("│", 2)[1].strip() for line in capsys.readouterr().out.splitlines() if "pray" in line]
    assert lines == ["the first KING [ pray] you, sir", "the second KING [ pray] you, sir"]

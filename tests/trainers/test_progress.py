"""Progress bars name the layers that train, and the one that does worst."""

import re

import pytest
from factories import make_tiny_llama
from trainer_cases import arguments, decomposition, rows

from mxd.trainers import DistillationTrainer


@pytest.mark.parametrize(
    ("layers", "name", "end"),
    [
        ([1], "distil layer 1: ", r"loss \d\.\d{4}\]"),
        ([2, 0, 1], "distil layers 2, 0-1: ", r"loss \d\.\d{4}, layer [012] \d\.\d{4}\]"),
    ],
)
def test_the_bar_names_the_layers(tmp_path, capsys, layers, name, end):
    args = arguments(tmp_path, max_steps=2, logging_steps=1, disable_tqdm=False)
    trainer = DistillationTrainer(decomposition(layers), make_tiny_llama(), args, train_dataset=rows())
    trainer.train()
    shown = capsys.readouterr().err
    assert name in shown and re.search(end, shown)
    if len(layers) > 1:
        logged = {key: value for key, value in trainer.state.log_history[1].items() if key.endswith("/loss")}
        worst = max(logged, key=logged.get)
        assert (
            f"loss {trainer.state.log_history[1]['loss']:.4f}, {worst[:7].replace('_', ' ')} {logged[worst]:.4f}"
            in shown
        )

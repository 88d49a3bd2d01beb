import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from trainer_cases import ARGUMENTS

from mxd.base import activation_cache
from mxd.base.activation_cache import ActivationCache
from mxd.base.capture import capture_mlps
from mxd.modeling_mxd import MxDConfig, MxDModel
from mxd.trainers import DistillationArguments, DistillationTrainer

LAYERS = [0, 2]


@pytest.fixture
def rows():
    return torch.randint(0, 64, (20, 12))


@pytest.fixture
def cache(tiny_llama, rows, tmp_path):
    return ActivationCache.record(tmp_path / "cache", tiny_llama, LAYERS, rows, rows_per_step=3)


def decomposition(layers=(0, 2), **changes):
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_experts": 48, "num_experts_per_tok": 4}
    return MxDModel(MxDConfig(layers=list(layers), hidden_act="silu", encoder_type="glu", **sizes, **changes))


def arguments(folder, **changes):
    changes = {"train_sampling_strategy": "sequential", "max_steps": -1, "num_train_epochs": 1, **changes}
    return DistillationArguments(**{"output_dir": str(folder), **ARGUMENTS, **changes})


def test_it_gives_what_the_model_gives(tiny_llama, rows, cache):
    order = torch.randperm(len(rows))[:7]
    expected = capture_mlps(tiny_llama, LAYERS, rows[order])
    got = cache({"input_ids": rows[order], "attention_mask": torch.ones(7, 12)})
    assert list(got) == LAYERS
    for layer in LAYERS:
        for tensor, wanted in zip(got[layer], expected[layer], strict=True):
            assert tensor.dtype == torch.bfloat16
            torch.testing.assert_close(tensor.float(), wanted, rtol=2**-8, atol=1e-6)


def test_it_is_the_training_data_in_its_order(rows, cache):
    (batch,) = DataLoader(cache, batch_size=len(rows))
    assert torch.equal(batch["input_ids"], rows)
    with pytest.raises(ValueError, match="not in the activation cache"):
        cache({"input_ids": rows.roll(1)})


def test_training_on_it_is_training_on_the_live_teacher(tiny_llama, rows, tmp_path):
    tiny_llama.bfloat16()  # so that rounding what is cached changes nothing
    cache = ActivationCache.record(tmp_path / "cache", tiny_llama, LAYERS, rows)
    trained = []
    for given in ({"train_dataset": [{"input_ids": row} for row in rows]}, {"activations": cache}):
        torch.manual_seed(0)
        model = decomposition()
        trainer = DistillationTrainer(model, tiny_llama, arguments(tmp_path / "out", num_train_epochs=2), **given)
        trainer.train()
        assert trainer.state.global_step == 6
        trained.append(model.state_dict())
    live, cached = trained
    assert all(torch.equal(live[name], cached[name]) for name in live)


def test_every_epoch_has_the_rows_in_their_order(tiny_llama, rows, cache, tmp_path, monkeypatch):
    seen, training_step = [], DistillationTrainer.training_step

    def keep(self, model, inputs, *args):
        seen.append(inputs["input_ids"])
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(DistillationTrainer, "training_step", keep)
    for method in ("mxd", "transcoder"):
        settings = arguments(tmp_path / "out", num_train_epochs=3)
        DistillationTrainer(decomposition([2], method=method), tiny_llama, settings, activations=cache).train()
        assert torch.equal(torch.cat(seen), rows.repeat(3, 1))
        seen.clear()


def test_the_teacher_does_not_run(tiny_llama, cache, tmp_path):
    tiny_llama.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    settings = arguments(tmp_path / "out", eval_strategy="epoch")
    trainer = DistillationTrainer(decomposition([2]), tiny_llama, settings, activations=cache, eval_dataset=cache)
    assert trainer.train_dataset is cache
    trainer.train()
    assert any("eval_nmse" in entry for entry in trainer.state.log_history)


def test_a_dataset_of_its_own_takes_some_of_the_rows(tiny_llama, rows, cache, tmp_path):
    data = [{"input_ids": row} for row in rows[:8]]
    trainer = DistillationTrainer(
        decomposition([2]), tiny_llama, arguments(tmp_path / "out"), train_dataset=data, activations=cache
    )
    assert trainer.train().global_step == 1


def test_layers_that_are_not_in_it_are_refused(tiny_llama, cache, tmp_path):
    with pytest.raises(ValueError, match=r"cache has layers \[0, 2\].*decomposition has layers \[1\]"):
        DistillationTrainer(decomposition([1]), tiny_llama, arguments(tmp_path / "out"), activations=cache)


def test_an_interrupted_cache_goes_on(tiny_llama, rows, cache, tmp_path, monkeypatch):
    expected = cache({"input_ids": rows})
    folder, runs = tmp_path / "interrupted", []

    def interrupt(*_):
        runs.append(1)
        if len(runs) == 5:  # the first looks at the widths
            raise KeyboardInterrupt

    handle = tiny_llama.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ActivationCache.record(folder, tiny_llama, LAYERS, rows, rows_per_step=3)
    handle.remove()
    assert json.loads((folder / "manifest.json").read_text())["recorded"] == 9
    with pytest.raises(ValueError, match="no complete activation cache"):
        ActivationCache(folder)
    seen = []
    tiny_llama.register_forward_pre_hook(lambda _, args, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    resumed = ActivationCache.record(folder, tiny_llama, LAYERS, rows, rows_per_step=3)
    assert sum(seen[1:]) == len(rows) - 9
    got = resumed({"input_ids": rows})
    assert all(torch.equal(a, b) for layer in LAYERS for a, b in zip(got[layer], expected[layer], strict=True))
    # A finished one is only opened.
    ActivationCache.record(folder, tiny_llama, LAYERS, rows)
    assert sum(seen[1:]) == len(rows) - 9 + 1


@pytest.mark.parametrize("begun", ["after the other", "before the other"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_one_process_records_at_a_time(tiny_llama, rows, cache, tmp_path, monkeypatch, overwrite, begun):
    """Files that another one replaces would be taken for complete, with zeros in them."""
    folder = tmp_path / "new"

    def record(**changes):
        return ActivationCache.record(folder, tiny_llama, LAYERS, rows, rows_per_step=3, **changes)

    def other(*given, **how):
        monkeypatch.undo()
        if begun == "after the other":
            with pytest.raises(ValueError, match=r"another process records the activation cache .*new: wait"):
                record(overwrite=overwrite)
        else:
            record()
        return original(*given, **how)

    name = "_check_space" if begun == "after the other" else "FileLock"  # once it has looked into the folder
    original = getattr(activation_cache, name)
    monkeypatch.setattr(activation_cache, name, other)
    if begun == "before the other":
        with pytest.raises(ValueError, match="another process records"):
            record(overwrite=overwrite)
    else:
        record()
    got, expected = ActivationCache(folder)({"input_ids": rows}), cache({"input_ids": rows})
    assert all(torch.equal(a, b) for layer in LAYERS for a, b in zip(got[layer], expected[layer], strict=True))


@pytest.mark.parametrize("file", ["rows.bin", "layer_0_inputs.bin", "layer_2_outputs.bin"])
@pytest.mark.parametrize("fault", ["a bit", "short", "missing"])
def test_a_broken_cache_is_refused_by_name(tiny_llama, rows, cache, tmp_path, file, fault):
    path = tmp_path / "cache" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink() if fault == "missing" else path.write_bytes(content if fault == "a bit" else content[:-2])
    for again in (ActivationCache, lambda folder: ActivationCache.record(folder, tiny_llama, LAYERS, rows)):
        if (fault, file) == ("a bit", "rows.bin") and again is not ActivationCache:
            continue  # other rows
        with pytest.raises(
            ValueError, match=rf"{file} is (broken in its rows 0 to 19|missing or not \d+ bytes).*delete"
        ):
            again(tmp_path / "cache")
    mended = ActivationCache.record(tmp_path / "cache", tiny_llama, LAYERS, rows, overwrite=True)
    assert torch.equal(mended({"input_ids": rows})[0][0], capture_mlps(tiny_llama, [0], rows)[0][0].bfloat16())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"manifest": {}, "recorded": 3, "checksums": {}}'])
def test_a_broken_manifest_is_refused_by_name(tiny_llama, rows, cache, tmp_path, text):
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest"):
        ActivationCache(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest"):
        ActivationCache.record(tmp_path / "cache", tiny_llama, LAYERS, rows)
    assert len(ActivationCache.record(tmp_path / "cache", tiny_llama, LAYERS, rows, overwrite=True)) == 20


def test_rows_that_were_recorded_before_a_kill_are_checked_and_others_recorded_again(
    tiny_llama, rows, cache, tmp_path, monkeypatch
):
    expected, folder = cache({"input_ids": rows}), tmp_path / "killed"
    calls, stored = [], activation_cache._write_state

    def store(*state):
        stored(*state)
        if calls.append(1) or len(calls) == 3:
            raise SystemExit  # the state after this is lost

    monkeypatch.setattr(activation_cache, "_SAVE_SECONDS", -1)
    monkeypatch.setattr(activation_cache, "_write_state", store)
    with pytest.raises(SystemExit):
        ActivationCache.record(folder, tiny_llama, LAYERS, rows, rows_per_step=3)
    monkeypatch.setattr(activation_cache, "_write_state", stored)
    state = json.loads((folder / "manifest.json").read_text())
    done = state["recorded"]
    assert 0 < done < 20 and state["checksums"]["ends"][-1] == done
    path = folder / "layer_2_inputs.bin"
    content = bytearray(path.read_bytes())
    row = len(content) // 20
    content[done * row :] = bytes(len(content) - done * row)  # what was not on the disk yet
    path.write_bytes(content)
    got = ActivationCache.record(folder, tiny_llama, LAYERS, rows, rows_per_step=3)({"input_ids": rows})
    assert all(torch.equal(a, b) for layer in LAYERS for a, b in zip(got[layer], expected[layer], strict=True))
    (folder / "manifest.json").write_text(json.dumps(state))
    content[row // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"layer_2_inputs.bin is broken in its rows 0 to"):
        ActivationCache.record(folder, tiny_llama, LAYERS, rows)


def test_the_disk_is_checked_before_the_model_runs(tiny_llama, rows, tmp_path, monkeypatch, caplog):
    size = 20 * 12 * (4 + 2 * 2 * (16 + 16))
    for free, message in ((size - 1, "use fewer tokens"), (size, "takes 3.17e-05 GB more of the disk")):
        monkeypatch.setattr(activation_cache.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if free < size:
            with pytest.raises(OSError, match=message):
                ActivationCache.record(tmp_path / "cache", tiny_llama, LAYERS, rows)
            assert not list((tmp_path / "cache").glob("[!.]*"))
        else:
            ActivationCache.record(tmp_path / "cache", tiny_llama, LAYERS, rows)
            assert message in caplog.text


def test_a_larger_cache_serves_fewer_rows_and_layers(tiny_llama, rows, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_cache, "_record", lambda *_: pytest.fail("it was recorded again"))
    for layers, some in (([2], rows), (LAYERS, rows[:7]), ([0], rows[:1])):
        found = ActivationCache.record(tmp_path / "cache", tiny_llama, layers, some)
        assert torch.equal(found.rows, some.int()) and found({"input_ids": some[-1:]}, layers)
    for layers, other in (([1, 2], rows), (LAYERS, rows[1:]), (LAYERS, torch.cat([rows, rows]))):
        with pytest.raises(ValueError, match="another cache"):
            ActivationCache.record(tmp_path / "cache", tiny_llama, layers, other)


def test_another_cache_is_refused_or_replaced(tiny_llama, rows, cache, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match="different: rows"):
        ActivationCache.record(folder, tiny_llama, LAYERS, rows.flip(0))
    with pytest.raises(ValueError, match="different: layers"):
        ActivationCache.record(folder, tiny_llama, [1], rows)
    tiny_llama.config._name_or_path, tiny_llama.config._commit_hash = "user/other", "0" * 40
    with pytest.raises(ValueError, match="different: base_model, base_model_revision"):
        ActivationCache.record(folder, tiny_llama, LAYERS, rows)
    tiny_llama.bfloat16().model.layers[0].mlp.up_proj.weight.data.add_(0.1)
    replaced = ActivationCache.record(folder, tiny_llama, LAYERS, rows, overwrite=True)
    about = {"base_model": "user/other", "base_model_revision": "0" * 40, "dtype": "bfloat16", "layers": LAYERS}
    assert about.items() <= replaced.manifest.items()
    y, y_before = (teacher({"input_ids": rows[:1]})[0][1] for teacher in (replaced, cache))
    assert not torch.equal(y, y_before)


def test_a_smaller_cache_takes_the_place_of_another(tiny_llama, rows, cache, tmp_path):
    ActivationCache.record(tmp_path / "cache", tiny_llama, LAYERS[:1], rows[4:8], overwrite=True)
    assert len(ActivationCache(tmp_path / "cache")) == 4
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 3  # none of the other's are left


def test_some_layers_alone_are_read(rows, cache):
    batch = {"input_ids": rows[:2]}
    whole = cache(batch)
    some = cache(batch, LAYERS[:1])
    assert list(some) == LAYERS[:1] and torch.equal(some[LAYERS[0]][0], whole[LAYERS[0]][0])


@pytest.mark.parametrize("shape", [(0, 12), (12,)])
def test_rows_that_are_none(tiny_llama, tmp_path, shape):
    with pytest.raises(ValueError, match="at least one token"):
        ActivationCache.record(tmp_path / "cache", tiny_llama, LAYERS, torch.zeros(shape, dtype=torch.int64))

"""The directions beside the weights: saved, read when asked for, carried along, and refused if they do not fit."""

import copy
import pickle
import re

import pytest
import torch
from factories import FORMS, random_mxd_model, with_directions
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mxd.modeling_mxd import DIRECTIONS_NAME, MxDModel, make_spliced

CASES = {**FORMS, "one wider": {"layer_overrides": {"2": {"num_experts": 30}}},
         "one transcoder": {"layer_overrides": {"0": {"method": "transcoder"}}}}  # fmt: skip


def equal(one, other, layers=(0, 2)):
    return all(torch.equal(*pair) for i in layers for pair in zip(one.directions(i), other.directions(i), strict=True))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_they_are_saved_read_and_saved_again(tmp_path, changes):
    model = with_directions(random_mxd_model((0, 2), **changes), "a test")
    model.save_pretrained(tmp_path / "one")
    loaded = MxDModel.from_pretrained(tmp_path / "one")
    assert loaded._directions is None  # only when asked for
    loaded.save_pretrained(tmp_path / "two")
    again = MxDModel.from_pretrained(tmp_path / "two")
    assert equal(again, model) and equal(loaded, model)
    assert again.direction_file.source == "a test"
    part = MxDModel.from_pretrained(tmp_path / "two", layers=[2])
    part.save_pretrained(tmp_path / "two")  # over the folder that it comes from
    assert equal(MxDModel.from_pretrained(tmp_path / "two"), model, [2])
    names = load_file(tmp_path / "two" / DIRECTIONS_NAME).keys()
    assert {name.split(".")[1] for name in names} == {"2"}
    with safe_open(tmp_path / "one" / DIRECTIONS_NAME, framework="pt") as file:
        assert file.metadata() == {"format_version": "1", "source": "a test"}


def test_a_transcoders_are_its_decoder():
    model = with_directions(random_mxd_model((1,), method="transcoder"))
    assert model.directions(1).direction.data_ptr() == model.layer(1).decoder.data_ptr()


def test_without_them_the_error_says_what_makes_them(tmp_path):
    model = random_mxd_model((1,))
    model.save_pretrained(tmp_path)
    for one in (model, MxDModel.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"has no directions.safetensors, .*: `mxd experts FOLDER` makes it"):
            one.directions(1)
        with pytest.raises(KeyError, match="layer 5"):
            one.directions(5)


def test_those_of_another_decomposition_do_not_stay_in_the_folder(tmp_path):
    with_directions(random_mxd_model((1,))).save_pretrained(tmp_path)
    random_mxd_model((1,)).save_pretrained(tmp_path)
    assert not (tmp_path / DIRECTIONS_NAME).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.direction": torch.zeros(24, 15)}, "'layers.1.direction' has the shape [24, 15]"),
        ({"layers.1.maximum": torch.zeros(24, dtype=torch.int64)}, "'layers.1.maximum' has the dtype I64"),
        ({"layers.1.maximum": None}, "layers.1.maximum is missing"),
        ({"layers.1.direction": torch.full((24, 16), torch.nan)}, "values that are not finite"),
        ({"else": torch.zeros(1)}, "'else' is not the decomposition's"),
        ("no safetensors", "is no complete safetensors file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    with_directions(random_mxd_model((1,))).save_pretrained(tmp_path)
    path = tmp_path / DIRECTIONS_NAME
    if isinstance(change, str):
        path.write_text(change)
    else:
        save_file({name: value for name, value in {**load_file(path), **change}.items() if value is not None}, path)
    with pytest.raises(ValueError, match=re.escape(message)):
        MxDModel.from_pretrained(tmp_path).directions(1)


@pytest.mark.parametrize("given", [({}, {}), ({1: torch.rand(24)}, {}), ({1: torch.rand(24)}, {1: torch.rand(24, 15)})])
def test_given_ones_must_fit(given):
    with pytest.raises(ValueError, match=r"layers.1.(maximum|direction) must be given, with the shape"):
        random_mxd_model((1,)).set_directions(*given, "a test")


def test_copies_keep_them_and_pickles_no_token(tiny_llama, tmp_path):
    with_directions(random_mxd_model((1,))).save_pretrained(tmp_path)
    loaded = MxDModel.from_pretrained(tmp_path, token="hf_secret")
    model = make_spliced(tiny_llama, loaded, "decomposition")
    assert equal(copy.deepcopy(model).decomposition, loaded, [1])
    assert equal(pickle.loads(pickle.dumps(model)).decomposition, loaded, [1])
    assert b"hf_secret" not in pickle.dumps(loaded)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / DIRECTIONS_NAME).exists()

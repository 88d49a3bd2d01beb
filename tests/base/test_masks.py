import pytest
import torch

from mxd.base.masks import activation_mask, token_mask

IDS = torch.tensor([[0, 5, 6, 7], [0, 5, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0]])
PADDING = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])


def test_everything_but_padding_counts():
    assert token_mask(IDS).all()
    assert token_mask(IDS).dtype == torch.bool
    assert torch.equal(token_mask(IDS, PADDING), PADDING.bool())


def test_the_first_unpadded_position_is_told_by_place_on_either_side():
    expected = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(token_mask(IDS, PADDING, include_first=False), expected)
    assert torch.equal(token_mask(IDS + 7, PADDING, include_first=False), expected)  # no id of 0 anywhere
    assert torch.equal(token_mask(IDS, include_first=False), torch.tensor([[False, True, True, True]] * 4))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(dtype):
    for first in (True, False):
        assert torch.equal(token_mask(IDS, PADDING.to(dtype), first), token_mask(IDS, PADDING, first))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 3), (4, 1, 4, 4)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids \(4, 4\), got"):
        token_mask(IDS, torch.ones(shape))


def test_labels_say_which_positions_of_a_decoder_are_padding():
    labels, x = IDS.where(PADDING.bool(), -100), torch.zeros(4, 4, 3)
    for inputs in ({"labels": labels}, {"labels": labels, "decoder_input_ids": IDS}):
        assert torch.equal(activation_mask({"input_ids": IDS, **inputs}, x, decoder=True), PADDING.bool())
    own = {"labels": labels, "decoder_attention_mask": torch.ones_like(IDS)}
    assert activation_mask(own, x, decoder=True).all()

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from mxd.experts.logit_effects import find_unembedding

EXAMPLE = torch.tensor([[3, 5, 7, 9]])


@pytest.mark.parametrize(
    ("model_type", "subtracts_mean"),
    [("llama", False), ("gemma2", False), ("gpt2", True), ("gpt_neox", True), ("phi", True), ("opt", True),
     ("falcon", True), ("mixtral", False), ("cohere", True), ("qwen3", False)],
)  # fmt: skip
def test_effects_are_the_change_of_logits_by_a_small_step(model_type, subtracts_mean):
    """Add a small step to the output of the last layer: the logits change by the effects, but for the norm's size."""
    model = tiny_model(model_type).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    found = find_unembedding(model, EXAMPLE)
    assert found.subtracts_mean == subtracts_mean
    last = max(
        (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)), key=len
    )[-1]  # fmt: skip
    step, seen = torch.randn(found.weight.shape[1]), []

    def add(_, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden[0, -1].detach())
        away = step - (step @ hidden[0, -1]) / hidden[0, -1].square().sum() * hidden[0, -1]
        moved = hidden + 1e-2 * away if seen[1:] else hidden
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with last.register_forward_hook(add), torch.no_grad():
        before, after = (model(EXAMPLE, use_cache=False).logits[0, -1] for _ in range(2))
    change = after - before
    hidden = seen[0]
    if subtracts_mean:
        hidden = hidden - hidden.mean()
        step = step - step.mean()
    away = step - (step @ seen[0]) / seen[0].square().sum() * seen[0]
    effects = found.effects(away[None])[0]
    similar = torch.cosine_similarity(change - change.mean(), effects, dim=0)
    assert similar > 0.97

"""Measure replacements of one MLP side by side on held-out text; the decoder layers before it run once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mxd.base.base_model import bfloat16_is_emulated
from mxd.evaluation.faithfulness import LayerEvaluation
from mxd.evaluation.metrics import LogitSums
from mxd.evaluation.paired import PairedDifference
from mxd.modeling_mxd import SparseLayer

ROWS_PER_STEP = 8
COMPARED = 4  # KL is measured on one batch in so many
BFLOAT16 = not bfloat16_is_emulated()


class HeldOut:
    """Held-out rows, and the untouched model's input of one decoder layer on them.

    The decoder layers before that one are removed from the model.

    Args:
        model: a model whose decoder layers are a list, as in Llama.
        layer: index of the decoder layer.
        ids: (rows, tokens).
    """

    def __init__(self, model: PreTrainedModel, layer: int, ids: Tensor):
        self.model, self.ids = model, ids
        self.decoder = model.model
        layers, norm = self.decoder.layers, self.decoder.norm
        self.decoder.layers, self.decoder.norm = layers[:layer], nn.Identity()
        parts = tqdm(ids.split(ROWS_PER_STEP), desc="held-out text", unit="batch")
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            self.hidden = torch.cat([self.decoder(input_ids=part).last_hidden_state.float() for part in parts])
        self.decoder.layers, self.decoder.norm = layers[layer:], norm
        self.block = self.decoder.layers[0]

    def logits(self, part: slice) -> Tensor:
        """Return the logits of some rows, (rows, tokens, vocabulary)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            return self.model(inputs_embeds=self.hidden[part], use_cache=False).logits

    def measure(self, layers: Mapping[str, SparseLayer], over: str | None = None) -> dict[str, dict[str, Any]]:
        """Measure every layer as `faithfulness` does, with its rise of cross-entropy and KL.

        Args:
            layers: the layers by name.
            over: a layer, the first one, whose cross-entropy the others are also compared with.
        """
        evaluations = {
            name: LayerEvaluation(layer, (layer.expert_frequency, layer.expert_mean)) for name, layer in layers.items()
        }
        sums = {name: LogitSums() for name in layers}
        rises, rises_over = ({name: PairedDifference() for name in layers} for _ in range(2))
        untouched, mlp = LogitSums(), self.block.mlp
        for start in tqdm(range(0, len(self.ids), ROWS_PER_STEP), desc="evaluate", unit="batch"):
            part = slice(start, start + ROWS_PER_STEP)
            ids = self.ids[part]
            kept: list[tuple[Tensor, Tensor]] = []
            every, without_first = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
            without_first[:, 0] = False
            self.block.mlp = mlp
            with mlp.register_forward_hook(lambda _, inputs, output, kept=kept: kept.append((inputs[0], output))):
                reference = self.logits(part)
            losses = untouched.update(reference, ids, every)
            (x, y) = (tensor.float() for tensor in kept[0])
            of_other: Tensor | None = None
            for name, layer in layers.items():
                evaluations[name].update(x, y, every, without_first)
                self.block.mlp = InFloat32(layer)
                compared = reference if start // ROWS_PER_STEP % COMPARED == 0 else None
                spliced = sums[name].update(self.logits(part), ids, every, reference=compared)
                of_other = spliced if name == over else of_other
                rises[name].update(spliced - losses, every[:, 1:])
                if of_other is not None:
                    rises_over[name].update(spliced - of_other, every[:, 1:])
        self.block.mlp = mlp
        return {
            name: {
                "layer": evaluations[name].result(),
                "untouched": untouched.cross_entropy,
                "rise": rise.mean,
                "rise_interval": rise.interval,
                "kl": sums[name].kl,
                "held_out_tokens": untouched.targets,
            }
            | ({"rise_over": over_it.mean, "rise_over_interval": over_it.interval} if over else {})
            for (name, rise), over_it in zip(rises.items(), rises_over.values(), strict=True)
        }


class InFloat32(nn.Module):
    """Run a layer in float32 under autocast."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) → (..., O)."""
        with torch.autocast("cpu", enabled=False):
            return self.module(x.float())

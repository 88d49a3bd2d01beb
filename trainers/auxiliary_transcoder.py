"""Auxiliary transcoder: a decoder that reads an MxD's coefficients while the MxD trains.

The distillation error alone does not require that the tokens of an expert have anything in common: where the dense
encoder computes the MLP by itself, any division of the tokens among experts has the same error. The latents of a skip
transcoder, in contrast, have to predict the output. A skip transcoder's decoder therefore reads the MxD's gate,

    ŷ = Vᵀa + Sᵀx + v,   a = TopK(ReLU(Gx + g)) of the MxD,

and its error is added to the loss. It is no part of the model: checkpoints store it in a file of its own. In the end
its decoder V is kept beside the weights, as the directions of the experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mxd.modeling_mxd import ExpertCoefficients, MxDConfig, MxDLayerConfig, MxDModel
from mxd.modeling_mxd.functional import expert_sum

FILE_NAME = "auxiliary_transcoder.safetensors"
ATTRIBUTE = "auxiliary"
"""Name of the submodule of an `MxDModel` while it trains."""


class AuxiliaryTranscoder(nn.Module):
    """ŷ = Vᵀa + Sᵀx + v, a skip transcoder without a gate, initialised at 0."""

    def __init__(self, config: MxDLayerConfig):
        super().__init__()
        self.decoder = nn.Parameter(torch.zeros(config.num_experts, config.output_size))  # V (N, O)
        # No random numbers are drawn, so that a seed gives the decomposition the same init with and without it.
        self.skip = nn.utils.skip_init(nn.Linear, config.hidden_size, config.output_size, bias=False)
        nn.init.zeros_(self.skip.weight)  # Sᵀ (O, I)
        self.output_bias = nn.Parameter(torch.zeros(config.output_size))  # v (O)

    def forward(self, coefficients: ExpertCoefficients, x: Tensor) -> Tensor:
        """Return ŷ (..., O) for coefficients (..., K) and the MLP's input x (..., I)."""
        return self.sum_experts(coefficients) + self.skip(x.to(self.decoder.dtype)) + self.output_bias

    def sum_experts(self, coefficients: ExpertCoefficients) -> Tensor:
        """Return Vᵀa (..., O)."""
        return expert_sum(coefficients.values.to(self.decoder.dtype), coefficients.indices, self.decoder)


class AuxiliaryTranscoders(nn.ModuleDict):
    """One `AuxiliaryTranscoder` for every MxD layer of a decomposition, by layer index, if `wanted`."""

    def __init__(self, config: MxDConfig, wanted: bool):
        configs = {layer: config.layer(layer) for layer in config.layers if wanted}
        super().__init__({str(index): AuxiliaryTranscoder(c) for index, c in configs.items() if c.method == "mxd"})

    def of_layer(self, layer: int) -> AuxiliaryTranscoder | None:
        """Return that of a layer, or None if the layer has none."""
        return self._modules.get(str(layer))  # type: ignore[return-value]

    def decoders(self) -> dict[int, Tensor]:
        """Return {layer: V (N, O)}: row v_n is the direction of expert n."""
        return {int(layer): module.decoder for layer, module in self.items()}  # type: ignore[misc]

    def reset_parameters(self) -> None:
        """Set all parameters to 0."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @contextmanager
    def attached(self, decomposition: MxDModel) -> Iterator[None]:
        """Make them a submodule of the decomposition inside the block.

        Whatever the Trainer does to its model (wrap it in DDP, clip and zero its gradients) then includes them.
        """
        if not len(self):
            yield
            return
        decomposition.add_module(ATTRIBUTE, self)
        # A checkpoint's model file is without them; transformers would warn of missing weights.
        ignored = decomposition._keys_to_ignore_on_save or set()
        decomposition._keys_to_ignore_on_save = {*ignored, *(f"{ATTRIBUTE}.{name}" for name in self.state_dict())}
        try:
            yield
        finally:
            delattr(decomposition, ATTRIBUTE)
            decomposition._keys_to_ignore_on_save = ignored

    def save(self, checkpoint: Path) -> None:
        """Write them into a checkpoint's folder, if there are any."""
        if len(self):
            save_file(self.state_dict(), checkpoint / FILE_NAME)

    def load(self, checkpoint: Path) -> None:
        """Read them from a checkpoint's folder; a ValueError if only one of it and this training has them."""
        path = checkpoint / FILE_NAME
        if path.is_file() != bool(len(self)):
            was = "with an auxiliary transcoder" if path.is_file() else "with auxiliary_weight 0"
            raise ValueError(f"{checkpoint} was trained {was}: resume it with the same auxiliary_weight")
        if len(self):
            self.load_state_dict(load_file(path))

"""Experts that stand for something: an MxD's coefficients shall be a sparse code of the MLP's output, too.

What an MxD is distilled on does not ask that the tokens of an expert have anything in common: where its dense part
computes the MLP by itself, any division of the tokens among experts will do. A skip transcoder's latents have to say
what the output is. So while an MxD trains, a skip transcoder's decoder reads its gate,

    ŷ = Vᵀa + Sᵀx + v,   a = TopK(ReLU(Gx + g)) the MxD's own,

and its error is added to the loss. It is in no decomposition that is saved; checkpoints keep it in a file beside.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling_mxd import ExpertCoefficients, MxDLayerConfig, MxDModel
from modeling_mxd.functional import expert_sum

FILE_NAME = "sparse_code.safetensors"
_MODULE = "sparse_code"


class SparseCode(nn.Module):
    """ŷ = Vᵀa + Sᵀx + v, a skip transcoder without a gate of its own. Starts at 0.

    Attributes:
        decoder: V (N, O).
        skip: `nn.Linear` without bias, weight Sᵀ (O, I).
        output_bias: v (O).
    """

    def __init__(self, config: MxDLayerConfig):
        super().__init__()
        self.decoder = nn.Parameter(torch.zeros(config.num_experts, config.output_size))
        self.skip = nn.utils.skip_init(
            nn.Linear, config.hidden_size, config.output_size, bias=False
        )  # no random numbers
        self.output_bias = nn.Parameter(torch.zeros(config.output_size))
        nn.init.zeros_(self.skip.weight)

    def forward(self, coefficients: ExpertCoefficients, x: Tensor, sparse_gradients: bool = False) -> Tensor:
        """ŷ (..., O) for coefficients (..., K) and the MLP's input x (..., I)."""
        values, indices = coefficients
        coded = expert_sum(values.to(self.decoder.dtype), indices, self.decoder, sparse_gradients)
        return coded + self.skip(x.to(self.decoder.dtype)) + self.output_bias


class SparseCodes:
    """The sparse codes of a decomposition's MxD layers, which are their submodules only inside `attached`, so that they
    train with them and are not saved with them."""

    def __init__(self, decomposition: MxDModel):
        layers = {index: decomposition.layer(index) for index in decomposition.config.layers}
        self._layers = {index: layer for index, layer in layers.items() if layer.config.method == "mxd"}
        self._codes = {index: SparseCode(layer.config) for index, layer in self._layers.items()}

    def __contains__(self, layer: int) -> bool:
        return layer in self._codes

    def __getitem__(self, layer: int) -> SparseCode:
        return self._codes[layer]

    @contextmanager
    def attached(self, attached: bool = True) -> Iterator[None]:
        """Submodules of the layers inside the block, each on its layer's device; or, with False, not."""
        before = {index: hasattr(layer, _MODULE) for index, layer in self._layers.items()}
        self._set(dict.fromkeys(before, attached))
        try:
            yield
        finally:
            self._set(before)

    def _set(self, attached: Mapping[int, bool]) -> None:
        for index, layer in self._layers.items():
            if attached[index]:
                layer.add_module(_MODULE, self._codes[index].to(layer.gate.weight.device))
            elif hasattr(layer, _MODULE):
                delattr(layer, _MODULE)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{index}.{name}": tensor
            for index, code in self._codes.items()
            for name, tensor in code.state_dict().items()
        }

    def save(self, checkpoint: Path) -> None:
        """Write them into a checkpoint's folder."""
        save_file(self._tensors, checkpoint / FILE_NAME)

    def load(self, checkpoint: Path) -> None:
        """Read them back.

        Raises:
            ValueError: when the checkpoint has none, or those of another decomposition.
        """
        path = checkpoint / FILE_NAME
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {FILE_NAME}: it was trained without sparse_code_weight, resume it so"
            )
        found, own = load_file(path), self._tensors
        if {name: tensor.shape for name, tensor in found.items()} != {name: t.shape for name, t in own.items()}:
            raise ValueError(f"{path} is of a decomposition with other layers or sizes")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])

"""Experts that stand for something: an MxD's coefficients shall be a sparse code of the MLP's output, too.

What an MxD is distilled on does not ask that the tokens of an expert have anything in common: where its dense part
computes the MLP by itself, any division of the tokens among experts will do. A skip transcoder's latents have to say
what the output is. So while an MxD trains, a skip transcoder's decoder reads its gate,

    ŷ = Vᵀa + Sᵀx + v,   a = TopK(ReLU(Gx + g)) the MxD's own,

and its error is added to the loss. It is no part of the model: checkpoints keep it in a file beside.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from mxd.modeling_mxd import ExpertCoefficients, MxDLayerConfig, MxDModel
from mxd.modeling_mxd.functional import expert_sum

FILE_NAME = "auxiliary_transcoder.safetensors"
PARAMETERS = "auxiliary."
"""What the names of a layer's sparse code's parameters begin with among the trained ones."""


class AuxiliaryTranscoder(nn.Module):
    """ŷ = Vᵀa + Sᵀx + v, a skip transcoder without a gate of its own. Starts at 0.

    Attributes:
        decoder: V (N, O).
        skip: `nn.Linear` without bias, weight Sᵀ (O, I).
        output_bias: v (O).
    """

    def __init__(self, config: MxDLayerConfig):
        super().__init__()
        self.decoder = nn.Parameter(torch.zeros(config.num_experts, config.output_size))
        # No random numbers are taken: with and without it a seed gives the decomposition the same start.
        self.skip = nn.utils.skip_init(nn.Linear, config.hidden_size, config.output_size, bias=False)
        nn.init.zeros_(self.skip.weight)
        self.output_bias = nn.Parameter(torch.zeros(config.output_size))

    def forward(self, coefficients: ExpertCoefficients, x: Tensor) -> Tensor:
        """ŷ (..., O) for coefficients (..., K) and the MLP's input x (..., I)."""
        values, indices = coefficients
        coded = expert_sum(values.to(self.decoder.dtype), indices, self.decoder)
        return coded + self.skip(x.to(self.decoder.dtype)) + self.output_bias


class AuxiliaryTranscoders(nn.ModuleDict):
    """The `AuxiliaryTranscoder` of every MxD layer of a decomposition, by index in words; transcoders have none.

    Args:
        decomposition: whose gates they read.
        wanted: if not, no layer has one.

    Attributes:
        coefficients: {layer: coefficients}, see `reading`.
    """

    def __init__(self, decomposition: MxDModel, wanted: bool = True):
        layers = decomposition.config.layers if wanted else ()
        configs = {index: decomposition.config.layer(index) for index in layers}
        super().__init__({str(index): AuxiliaryTranscoder(c) for index, c in configs.items() if c.method == "mxd"})
        self.coefficients: dict[int, ExpertCoefficients] = {}
        self._reading = False

    def of_layer(self, layer: int) -> AuxiliaryTranscoder | None:
        """That of a layer, if it has one."""
        if str(layer) not in self:
            return None
        code = self[str(layer)]
        assert isinstance(code, AuxiliaryTranscoder)
        return code

    def save(self, checkpoint: Path) -> None:
        """Write them into a checkpoint's folder, if there are any."""
        if len(self):
            save_file(self.state_dict(), checkpoint / FILE_NAME)

    def load(self, checkpoint: Path) -> None:
        """Read them back.

        Raises:
            ValueError: when the checkpoint has none where there are some, or the other way, or those of another
                decomposition.
        """
        path = checkpoint / FILE_NAME
        if path.is_file() and not len(self):
            raise ValueError(f"{checkpoint} was trained with a sparse code: resume it with its auxiliary_weight")
        if not len(self):
            return
        if not path.is_file():
            raise ValueError(f"{checkpoint} has no {FILE_NAME}: it was trained with auxiliary_weight 0, resume it so")
        found, own = load_file(path), self.state_dict()
        if {name: tensor.shape for name, tensor in found.items()} != {name: t.shape for name, t in own.items()}:
            raise ValueError(f"{path} is of a decomposition with other layers or sizes")
        self.load_state_dict(found)

    def restart(self) -> None:
        """Put all at 0."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def average_gradients(self, processes: int) -> None:
        """Their mean over the processes: nothing else takes it, these are in no wrapped model."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= processes

    @contextmanager
    def reading(self, decomposition: MxDModel) -> Iterator[None]:
        """Inside the block `coefficients` has what each layer's gate gave last, with its graph. Inside another such
        block it does nothing."""
        if self._reading:
            yield
            return

        def keep(index: int, _: nn.Module, __: Tensor, coefficients: ExpertCoefficients) -> None:
            self.coefficients[index] = coefficients

        layers = {int(index): decomposition.layer(int(index)) for index in self}
        handles = [layer.register_coefficient_hook(partial(keep, index)) for index, layer in layers.items()]
        self._reading = True
        try:
            yield
        finally:
            self._reading = False
            for handle in handles:
                handle.remove()
            self.coefficients.clear()


class FreshGradients(TrainerCallback):
    """What is not in the trainer's model has its gradients dropped with every step, too."""

    def __init__(self, module: nn.Module):
        self.module = module

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step that was not taken (an overflow in float16) leaves some."""
        self.module.zero_grad()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """They take no memory in what follows."""
        self.module.zero_grad()

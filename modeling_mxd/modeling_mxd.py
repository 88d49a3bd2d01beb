"""`MxDModel`: the layers of one decomposition as a transformers model, saved and loaded like any other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

# Every sibling is imported here, also the unused: a Hub repo carries only what its entry file names.
from .configuration_mxd import MxDConfig
from .functional import topk_gate  # noqa: F401
from .interventions import ExpertCoefficients  # noqa: F401
from .layers import MxDLayer, SparseLayer, TranscoderLayer, make_layer
from .parameter_budget import transcoder_parameters  # noqa: F401
from .reference import reference_forward  # noqa: F401
from .surgery import ReplacedMLP, replace_mlps, spliced_mlps


@dataclass
class MxDOutput(ModelOutput):
    """Output of `MxDModel.forward`."""

    output: Tensor | None = None
    """(..., O), the layer's approximation of the MLP's output"""


class MxDModel(PreTrainedModel):
    """The decomposed layers of one base model, without the base model.

    `model.layers["8"]` (or `model.layer(8)`) is the layer that stands for the MLP of transformer layer 8.

    Raises:
        ValueError: when the config names no layer, or sizes that this machine cannot hold.

    Example:
        >>> mxd = MxDModel.from_pretrained("gpt2-l8")  # doctest: +SKIP
        >>> with mxd.spliced(base_model):  # doctest: +SKIP
        ...     base_model.generate(**inputs)
    """

    config_class = MxDConfig
    config: MxDConfig
    base_model_prefix = "mxd"
    main_input_name = "hidden_states"
    _no_split_modules = ["MxDLayer", "TranscoderLayer"]

    def __init__(self, config: MxDConfig):
        super().__init__(config)
        if not config.layers:
            raise ValueError("config.layers is empty: a decomposition needs at least one layer")
        config.check_memory(torch.get_default_dtype())
        self.layers = nn.ModuleDict({str(layer): make_layer(config.layer(layer)) for layer in config.layers})
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MxDLayer | TranscoderLayer):
            module.reset_parameters()

    def _initialize_weights(self, module: nn.Module, *_: Any, **__: Any) -> None:
        # transformers passes over custom code's modules whose own tensors were all in the file, so a layer of which
        # only a linear is missing would keep unset memory. nn.init spares what was loaded: no need to pass over.
        super()._initialize_weights(module)

    def layer(self, layer: int) -> SparseLayer:
        """The layer that stands for the MLP of transformer layer `layer`.

        Raises:
            KeyError: when this decomposition has no such layer.
        """
        if str(layer) not in self.layers:
            raise KeyError(f"layer {layer} is not in this decomposition, which has layers {self.config.layers}")
        module = self.layers[str(layer)]
        assert isinstance(module, SparseLayer)
        return module

    def forward(self, hidden_states: Tensor, layer: int | None = None) -> MxDOutput:
        """Run one layer.

        Args:
            hidden_states: the MLP's input x, (..., I).
            layer: which layer; may be left out when there is only one.

        Raises:
            ValueError: when `layer` is left out and there are several.
        """
        if layer is None:
            if len(self.config.layers) > 1:
                raise ValueError(f"this decomposition has layers {self.config.layers}: say which with layer=")
            layer = self.config.layers[0]
        return MxDOutput(output=self.layer(layer)(hidden_states))

    def splice(self, model: nn.Module, cast: bool = True) -> list[ReplacedMLP]:
        """Put every layer in place of the base model's MLP, until `restore()` is called on what is returned.

        Raises:
            SurgeryError: as `replace_mlp`; the model is then as it was.
        """
        return replace_mlps(model, self._modules_by_layer(), cast=cast)

    @contextmanager
    def spliced(self, model: nn.Module, cast: bool = True) -> Iterator[list[ReplacedMLP]]:
        """Splice inside the block; afterwards, also after an exception, the base model is as it was."""
        with spliced_mlps(model, self._modules_by_layer(), cast=cast) as replaced:
            yield replaced

    def _modules_by_layer(self) -> dict[int, nn.Module]:
        return {layer: self.layer(layer) for layer in self.config.layers}

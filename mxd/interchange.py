"""Exchange transcoders with SAELens, circuit-tracer and sparsify, and show a layer to SAEBench as it shows an SAE.

    SAELens          a folder with cfg.json and sae_weights.safetensors    W_enc (I, N)
    circuit-tracer   a file, layer_8.safetensors                          W_enc (N, I)
    sparsify         a folder with cfg.json and sae.safetensors            encoder.weight (N, I)

All have biases of N and O numbers and W_dec (N, O), some W_skip (O, I) and thresholds (N). Only safetensors are read.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .base.pretrained_weights import record_base
from .modeling_mxd import (
    ExpertCoefficients,
    MxDConfig,
    MxDLayer,
    MxDLayerConfig,
    MxDModel,
    SparseLayer,
    TranscoderLayer,
)
from .modeling_mxd.configuration_mxd import read_json, shorten

_JUMP, _TOPK = "activation_function.threshold", ("topk",)
_RELU = ("standard", "transcoder", "skip_transcoder", "jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")


class JumpReLULayer(TranscoderLayer):
    """A transcoder of another library whose latent is active above a threshold of its own, a_n = z_n if z_n > θ_n.

    It runs and is measured like every layer; `save_pretrained` refuses it, since our format has no thresholds.
    """

    threshold: Tensor

    def __init__(self, config: MxDLayerConfig, threshold: Tensor):
        super().__init__(config)
        self.register_buffer("threshold", threshold)

    def encode(self, x: Tensor) -> ExpertCoefficients:
        values, indices = super().encode(x)
        return ExpertCoefficients(values * (values > self.threshold[indices]), indices)


def load_transcoder(path: str | Path, num_experts_per_tok: int | None = None) -> TranscoderLayer:
    """Load a transcoder that SAELens or sparsify saved in a folder, or circuit-tracer in a file.

    Args:
        path: the folder or file. Decoder norms and decoder biases that act on the input are folded into the weights.
        num_experts_per_tok: K. The file's own for TopK; for ReLU and JumpReLU all N, unless it is given: the K largest.

    Raises:
        ValueError: what is there is no transcoder, or is of a kind that a `TranscoderLayer` cannot compute.
        OSError: there is no such file.
    """
    path = Path(path)
    config = read_json(path / "cfg.json") if path.is_dir() else {}
    if path.is_dir():
        sparsify = (path / "sae.safetensors").is_file()
        weights = load_file(path / ("sae.safetensors" if sparsify else "sae_weights.safetensors"))
    else:
        sparsify, weights = False, load_file(path)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    read = _from_sparsify if sparsify else _from_sae_lens if config else _from_circuit_tracer
    try:
        tensors, k = read(weights, config)
        gate, decoder = tensors["gate.weight"], tensors["decoder"]
        k = num_experts_per_tok or k or len(gate)
        layer_config = MxDLayerConfig(
            hidden_size=gate.shape[1], output_size=decoder.shape[1], intermediate_size=gate.shape[1],
            num_experts=len(gate), num_experts_per_tok=min(k, len(gate)),
            method="skip_transcoder" if "skip.weight" in tensors else "transcoder",
        )  # fmt: skip
        threshold = tensors.pop("threshold", None)
        if threshold is not None and threshold.shape != gate.shape[:1]:
            raise ValueError(f"thresholds are {list(threshold.shape)}, latents {len(gate)}")
        layer = TranscoderLayer(layer_config) if threshold is None else JumpReLULayer(layer_config, threshold)
        missing = layer.load_state_dict(tensors, strict=False).missing_keys
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} holds no transcoder that can be read: {shorten(str(error))}") from error
    if lacking := set(missing) - {"expert_frequency", "expert_mean", "threshold"}:
        raise ValueError(f"{path} holds no transcoder that can be read: {sorted(lacking)[0]} is missing")
    return layer.eval()


def _from_circuit_tracer(w: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], int | None]:
    tensors = {"gate.weight": w["W_enc"], "gate.bias": w["b_enc"], "decoder": w["W_dec"], "output_bias": w["b_dec"]}
    optional = {"skip.weight": "W_skip", "threshold": _JUMP}
    return tensors | {ours: w[theirs] for ours, theirs in optional.items() if theirs in w}, None


def _from_sparsify(w: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], int | None]:
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise ValueError(f"sparsify's activation {shorten(config.get('activation'))} is not supported, only topk")
    renamed = {"W_enc": w["encoder.weight"], "b_enc": w["encoder.bias"]}
    tensors, _ = _from_circuit_tracer({**w, **renamed}, config)
    if not config.get("transcode"):  # an autoencoder: what it reads is relative to b_dec
        tensors["gate.bias"] = tensors["gate.bias"] - tensors["gate.weight"] @ tensors["output_bias"]
    return tensors, int(config["k"])


def _from_sae_lens(w: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], int | None]:
    kind = config.get("architecture")
    if kind not in _TOPK + _RELU:
        raise ValueError(f"SAELens's architecture {shorten(kind)} is not among {', '.join(_TOPK + _RELU)}")
    for name in ("normalize_activations", "reshape_activations"):
        if config.get(name, "none") != "none":
            raise ValueError(
                f"SAELens's {name} {shorten(config[name])} is not supported: fold it into the weights first"
            )
    renamed = {"W_enc": w["W_enc"].T, **({_JUMP: w["threshold"]} if "threshold" in w else {})}
    tensors, _ = _from_circuit_tracer({**w, **renamed}, config)
    if config.get("apply_b_dec_to_input", "transcoder" not in kind):
        tensors["gate.bias"] = tensors["gate.bias"] - tensors["gate.weight"] @ tensors["output_bias"]
    if config.get("rescale_acts_by_decoder_norm"):
        norms = tensors["decoder"].norm(dim=-1, keepdim=True)
        tensors["gate.weight"], tensors["gate.bias"] = (
            tensors["gate.weight"] * norms,
            tensors["gate.bias"] * norms[:, 0],
        )
        tensors["decoder"] = tensors["decoder"] / norms
    return tensors, int(config["k"]) if kind in _TOPK else None


def transcoder_decomposition(layers: Mapping[int, TranscoderLayer], model: PreTrainedModel | None = None) -> MxDModel:
    """Return transcoders, by the layer whose MLP they replace, as a decomposition: to splice, evaluate and save.

    With `model`, their base model, its name and commit are recorded, which the commands need.
    """
    decomposition = MxDModel(MxDConfig.from_layer_configs({index: layer.config for index, layer in layers.items()}))
    for index, layer in layers.items():
        decomposition.layers[str(index)] = layer
    if model is not None:
        record_base(decomposition, model)
    return decomposition.eval()


@torch.no_grad()
def mean_threshold(layer: SparseLayer, x: Tensor) -> float:
    """Return the threshold above which K latents a token are active in the mean over inputs x (..., I).

    Libraries without TopK use it in its place; then a token has more or fewer than K active latents.
    """
    scores = layer.gate(x.to(layer.gate.weight.dtype)).flatten(0, -2)
    count = len(scores) * layer.config.num_experts_per_tok
    return max(0.0, float(scores.flatten().kthvalue(max(1, scores.numel() - count)).values))


@torch.no_grad()
def export_transcoder(
    layer: TranscoderLayer,
    path: str | Path,
    tool: Literal["sae_lens", "circuit_tracer"],
    *,
    index: int,
    model_name: str,
    threshold: float | None = None,
) -> Path:
    """Write a transcoder for SAELens or circuit-tracer into a folder; return the folder, or the file.

    SAELens has TopK without skip and for equal widths only, which is exact; for all others give a `threshold`, such as
    `mean_threshold`. circuit-tracer reads ReLU or JumpReLU: set `activation_function` of what it loads to its `TopK`
    for exactly our layer, or give a threshold.

    Args:
        layer: the transcoder, with the exact gate.
        path: folder to write into.
        tool: who shall read it.
        index, model_name: whose MLP it replaces, in the names of TransformerLens.
        threshold: activate latents above it in place of the K largest.

    Raises:
        ValueError: the tool has no layer of this kind.
    """
    c, folder = layer.config, Path(path)
    if c.num_output_layers > 1:
        raise ValueError(f"{tool} has no transcoder that writes to {c.num_output_layers} MLPs")
    if not isinstance(layer, TranscoderLayer) or c.num_expert_groups is not None or isinstance(layer, JumpReLULayer):
        raise ValueError("only a TopK transcoder with the exact gate can be exported: an MxD needs its input to decode")
    weights = {"W_enc": layer.gate.weight, "W_dec": layer.decoder}
    weights["b_enc"] = weights["W_enc"].new_zeros(c.num_experts) if layer.gate.bias is None else layer.gate.bias
    weights["b_dec"] = weights["W_dec"].new_zeros(c.output_size) if layer.output_bias is None else layer.output_bias
    if layer.skip is not None:
        weights["W_skip"] = layer.skip.weight
    jump = {} if threshold is None else {"threshold": weights["b_enc"].new_full((c.num_experts,), threshold)}
    folder.mkdir(parents=True, exist_ok=True)
    if tool == "circuit_tracer":
        if c.hidden_size != c.output_size:
            raise ValueError(f"circuit-tracer needs equal widths, not {c.hidden_size} to {c.output_size}")
        file = folder / f"layer_{index}.safetensors"
        _save(weights | ({_JUMP: jump["threshold"]} if jump else {}), file)
        return file
    exact = layer.skip is None and c.hidden_size == c.output_size and threshold is None
    if not exact and threshold is None:
        raise ValueError(
            "SAELens has TopK only without skip and for equal widths: give threshold=mean_threshold(layer, x)"
        )
    kind = "topk" if exact else "jumprelu_transcoder" if layer.skip is None else "jumprelu_skip_transcoder"
    _save({**weights, **jump, "W_enc": weights["W_enc"].T}, folder / "sae_weights.safetensors")
    hooks = {"hook_name": f"blocks.{index}.mlp.hook_in", "hook_name_out": f"blocks.{index}.hook_mlp_out"}
    config = {
        "architecture": kind, "d_in": c.hidden_size, "d_sae": c.num_experts, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        **({"k": c.num_experts_per_tok, "rescale_acts_by_decoder_norm": False} if exact else {"d_out": c.output_size}),
        "metadata": {"sae_lens_version": "6.0.0", "model_name": model_name, "hook_layer": index, **hooks},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


def _save(weights: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}, path)


@dataclass
class SAEViewConfig:
    """The fields that SAEBench reads of an SAE's configuration."""

    model_name: str
    hook_layer: int
    hook_name: str
    d_in: int
    d_sae: int
    architecture: str
    dtype: str
    hook_head_index: int | None = None
    context_size: int | None = None
    prepend_bos: bool = True
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


class SAEView(nn.Module):
    """Show a layer, MxD or transcoder, to code that evaluates sparse autoencoders: dense `encode` and `decode`.

    Args:
        layer: the layer.
        index, model_name: whose MLP it replaces, in the names of TransformerLens.
        hook_name: where the layer's input is read. TransformerLens gives the output of an RMSNorm without its weight:
            then give that weight as `input_scale`.
        input_scale: (I), multiplied into the input first.
        directions: (N, O), what an expert writes, as `W_dec`. Defaults to the decoder's rows, of an MxD C.
    """

    def __init__(
        self,
        layer: SparseLayer,
        index: int,
        model_name: str,
        hook_name: str | None = None,
        input_scale: Tensor | None = None,
        directions: Tensor | None = None,
    ):
        super().__init__()
        c = layer.config
        self.layer = layer
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("W_dec", layer.expert_table.detach() if directions is None else directions)
        self.cfg = SAEViewConfig(
            model_name, index, hook_name or f"blocks.{index}.ln2.hook_normalized", c.hidden_size, c.num_experts,
            c.method, str(layer.expert_table.dtype).removeprefix("torch."),
        )  # fmt: skip
        self._last_input: Tensor | None = None

    input_scale: Tensor | None
    W_dec: Tensor

    @property
    def W_enc(self) -> Tensor:
        """Gᵀ, (I, N)."""
        return self.layer.gate.weight.T

    @property
    def b_enc(self) -> Tensor:
        """Bias of the gate, (N)."""
        return self.W_dec.new_zeros(self.cfg.d_sae) if self.layer.gate.bias is None else self.layer.gate.bias

    @property
    def b_dec(self) -> Tensor:
        """Bias of the output, (O)."""
        bias = self.layer.output_bias
        return self.W_dec.new_zeros(self.layer.config.output_size) if bias is None else bias

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.layer.expert_table.dtype

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.input_scale is None else x * self.input_scale

    def encode(self, x: Tensor) -> Tensor:
        """Return the coefficients of all experts, x (..., I) → (..., N)."""
        self._last_input = x.detach()
        return self.layer.encode(self._scaled(x)).to_dense(self.cfg.d_sae)

    def decode(self, coefficients: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the output (..., O) for coefficients (..., N).

        The output of an MxD, and of a skip transcoder, depends on the input, too: x, else that of the last `encode`.
        """
        needs = isinstance(self.layer, MxDLayer) or getattr(self.layer, "skip", None) is not None
        x = self._last_input if x is None else x
        if x is None or x.shape[:-1] != coefficients.shape[:-1]:
            if needs:
                raise ValueError(
                    f"the output of a {self.cfg.architecture} depends on its input, too: give decode its x"
                )
            x = coefficients.new_zeros(*coefficients.shape[:-1], self.cfg.d_in)
        summed = coefficients.to(self.dtype) @ self.layer.expert_table
        return self.layer.combine(summed, self._scaled(x).to(self.dtype)).to(coefficients.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x."""
        return self.decode(self.encode(x), x)

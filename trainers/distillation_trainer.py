"""Layerwise distillation: train a decomposition to reproduce the MLPs of a frozen model.

In a step the frozen model (the teacher) runs once on the token ids, only as far as the last layer needed, and the
inputs and outputs of the chosen MLPs are captured; or an activation cache provides them and the teacher does not run.
Then every layer in turn computes its loss and propagates it back, so that the graph of one layer only is alive at a
time. The Trainer's model is the decomposition: it alone is wrapped, optimised and saved.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.trainer_utils import TrainOutput

from mxd.base.activation_cache import ActivationCache
from mxd.base.capture import Activations, capture_layers, joined_outputs
from mxd.base.layer_names import layer_names
from mxd.base.masks import activation_mask, token_mask
from mxd.base.pretrained_weights import check_widths, record_base
from mxd.evaluation import normalised_error
from mxd.modeling_mxd import MLPSite, MxDConfig, MxDLayer, MxDModel, find_mlps
from mxd.modeling_mxd.surgery import written_sites

from .auxiliary_transcoder import ATTRIBUTE as AUXILIARY
from .auxiliary_transcoder import AuxiliaryTranscoders
from .decomposition_trainer import DecompositionTrainer
from .distillation_arguments import DistillationArguments
from .initialization import check_encoder_init, fit_later_outputs, init_decomposition
from .process_sums import sum_over_processes


class LayerLosses(NamedTuple):
    """Losses of one layer, weighted, each a sum over the tokens of a batch; scalars in float32."""

    distillation: Tensor  # the loss that is reported
    mean_ablation: Tensor
    auxiliary: Tensor


class DistillationTrainer(DecompositionTrainer):
    """Train an `MxDModel` on the MLP inputs and outputs of a frozen model.

    Args:
        model: The decomposition.
        teacher: The model that it decomposes, of any kind. It is put into eval mode, frozen, and not saved.
        args: A `DistillationArguments`.
        train_dataset, eval_dataset: Rows with `input_ids` (and `attention_mask` if there is padding), or with other
            inputs of the teacher; then pass a `data_collator` for them.
        activations: An `ActivationCache` of the teacher, which then never runs. It is also the default
            `train_dataset`, and contains all rows of both data sets. Its files are read in order with
            `train_sampling_strategy="sequential"`.
        **kwargs: As for `transformers.Trainer`.

    Raises:
        SurgeryError: The teacher has no such layer, or one of other widths.
        ValueError: The encoder is initialised from a pretrained MLP of another form or width, or a layer is not in
            `activations`.
    """

    args: DistillationArguments
    model: MxDModel

    def __init__(
        self,
        model: MxDModel,
        teacher: PreTrainedModel,
        args: DistillationArguments,
        train_dataset: Any = None,
        activations: ActivationCache | None = None,
        **kwargs: Any,
    ):
        record_base(model, teacher)
        config = model.config
        self.sites = check_layers(config, teacher, args)
        if activations is not None:
            _check_cached(activations, model)
            train_dataset = activations if train_dataset is None else train_dataset
        if len(config.layers) > 1 and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # each backward uses one layer's parameters only
        self.progress_name = f"distil {layer_names(config.layers)}"
        self.teacher = self.language_model = teacher.eval().requires_grad_(False)
        kwargs.setdefault("compute_metrics", partial(normalised_errors, layers=config.layers))
        super().__init__(model, model, args, train_dataset=train_dataset, **kwargs)
        self.activations = activations
        # By id: batches whose positions a forward pass counted, with its activations, until their training step.
        self._captured: dict[int, tuple[Mapping[str, Tensor], Activations]] = {}
        self.auxiliary = AuxiliaryTranscoders(config, wanted=args.auxiliary_weight > 0).to(args.device)
        if len(self.auxiliary) and self._optimizer_was_given:
            raise ValueError("a given optimizer does not step the auxiliary transcoder: set auxiliary_weight to 0")
        if activations is None and getattr(teacher, "hf_device_map", None) is None:  # else accelerate has placed it
            teacher.to(args.device)
        model.main_input_name = teacher.main_input_name  # by which transformers counts the tokens seen

    def prepare_batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Select the columns that the teacher reads, move them to the device, and padding to the right."""
        names = set(inspect.signature(self.teacher.forward).parameters)
        if not self.teacher.config.is_encoder_decoder:
            names -= {"labels"}  # an encoder–decoder model makes its decoder's inputs of them, others a loss only
        return super().prepare_batch({name: value for name, value in inputs.items() if name in names})

    def capture(self, inputs: Mapping[str, Tensor]) -> Activations:
        """Return {layer: (x, y)} of the teacher's MLPs for a batch; x (batch, tokens, I), y (batch, tokens, O)."""
        device, config = self.args.device, self.model.config
        if self.activations is not None:
            dtype = next(self.teacher.parameters()).dtype
            cached = joined_outputs(self.activations(inputs, config.written_layers()), config)
            return {layer: (x.to(device, dtype), y.to(device, dtype)) for layer, (x, y) in cached.items()}
        captured = capture_layers(self.teacher, config, **dict[str, Any](inputs))
        return {layer: (x.to(device), y.to(device)) for layer, (x, y) in captured.items()}

    def loss_mask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the positions that the loss includes, (batch, tokens) bool; without ids a forward pass counts them."""
        if self._positions_are_tokens(inputs):
            return token_mask(inputs["input_ids"], inputs.get("attention_mask"))
        x, _ = next(iter(self.capture(self.prepare_batch(inputs)).values()))
        return self._mask(inputs, x)

    def count_positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return how many positions of a batch the loss includes, from the forward pass of its training step if one is
        needed. The activations of all micro-batches of a step are then in memory together."""
        if self._positions_are_tokens(inputs):
            return super().count_positions(inputs)
        captured = self.capture(self.prepare_batch(inputs))
        self._captured[id(inputs)] = inputs, captured
        x, _ = next(iter(captured.values()))
        return self._mask(inputs, x).sum()

    def _positions_are_tokens(self, inputs: Mapping[str, Tensor]) -> bool:
        repeated = any(site.repeated for site in self.sites)
        return inputs.get("input_ids") is not None and not repeated and not self.teacher.config.is_encoder_decoder

    def _mask(self, inputs: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return activation_mask(inputs, x, decoder=self.model.config.of_decoder)

    @staticmethod
    def distillation_loss(
        prediction: Tensor,
        target: Tensor,
        mask: Tensor,
        normalization: str = "squared_norm",
        minimum_squared_norm: float = 0.0,
    ) -> Tensor:
        """Return the sum of the normalised squared errors of the tokens in `mask`, a scalar in float32.

            squared_norm   Σ_t ‖ŷ_t − y_t‖² / max(‖y_t‖², m)   paper's reported error for m = 0
            norm           Σ_t ‖ŷ_t − y_t‖² / ‖y_t‖            the authors' code, up to the constant 1/O

        `prediction` is ŷ (..., O), `target` y (..., O), `mask` (...) bool. m, the `minimum_squared_norm`, bounds the
        weight of tokens whose output is tiny.
        """
        if normalization == "squared_norm":
            return _relative_errors(prediction, target, mask, minimum_squared_norm).sum()
        norm = target.float().square().sum(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return ((prediction.float() - target.float()).square().sum(-1) / norm).where(mask, 0.0).sum()

    @staticmethod
    def mean_ablation_loss(
        ablated: Tensor, target: Tensor, mask: Tensor, minimum_error: float, minimum_squared_norm: float = 0.0
    ) -> Tensor:
        """Return the penalty for a layer that does well when it is not told which experts are active.

        Of several processes, each returns the part of its own tokens.

            T max(0, τ − ē),   ē = mean_t min(1, ‖ŷ_t − y_t‖² / max(‖y_t‖², m)),   ŷ_t = (mean_s Cᵀa_s) * Dᵀz_t + b

        over the T tokens in `mask` (...), with ŷ = `ablated` (..., O), y = `target` (..., O), τ = `minimum_error`
        and m = `minimum_squared_norm`. With the distillation loss alone, a dense encoder that is initialised from the
        MLP's own does everything by itself with Cᵀa = 1.
        """
        errors = _relative_errors(ablated, target, mask, minimum_squared_norm)
        missing = mask.sum() * minimum_error - errors.clamp_max(1).sum()
        return missing * (sum_over_processes(missing.detach()) > 0)

    def layer_losses(self, layer: int, x: Tensor, y: Tensor, mask: Tensor) -> LayerLosses:
        """Return the losses of a layer, given its MLP's input x (..., I) and output y (..., O); mask (...) bool."""
        module, auxiliary, least = self.model.layer(layer), self.auxiliary.of_layer(layer), self.least_norm(layer)
        error = partial(self.distillation_loss, target=y, mask=mask, normalization=self.args.loss_normalization)
        weight, minimum = self.args.mean_ablation_weight, self.args.min_mean_ablation_error
        coefficients = module.coefficients(x)
        penalty = coded_error = torch.zeros((), device=x.device)
        if module.config.method == "mxd" and weight * minimum > 0:
            summed = module.sum_experts(coefficients)  # Cᵀa
            total = sum_over_processes(summed.where(mask[..., None], 0.0).flatten(0, -2).sum(0, dtype=torch.float32))
            mean = (total / sum_over_processes(mask.sum()).clamp_min(1)).to(summed.dtype)
            both = torch.stack([summed, mean.expand_as(summed)])
            output, ablated = module.combine(both, x).to(x.dtype)  # the dense encoder runs once for both
            penalty = weight * self.mean_ablation_loss(ablated, y, mask, minimum, least)
        else:
            output = module.decode(coefficients, x)
        if auxiliary is not None:
            coded_error = self.args.auxiliary_weight * error(auxiliary(coefficients, x), minimum_squared_norm=least)
        return LayerLosses(error(output, minimum_squared_norm=least), penalty, coded_error)

    def _all_losses(self, layer: int, x: Tensor, y: Tensor, mask: Tensor) -> tuple[LayerLosses, Tensor | float]:
        return self.layer_losses(layer, x, y, mask), self.router_loss(layer, x, mask)

    def _as_forward(self, model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in place of the model's `forward`, on calls of which its wrappers (DDP, FSDP) act."""
        if model is self.model:
            return function(*args)
        attributes = self.model.__dict__
        before = attributes.get("forward")  # accelerate's, in mixed precision
        attributes["forward"] = function
        try:
            return model(*args)
        finally:
            del attributes["forward"]
            if before is not None:
                attributes["forward"] = before

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of every layer in turn; returns the mean loss of the layers, detached."""
        model.train()
        batch, inputs = inputs, self.prepare_batch(inputs)
        if num_items_in_batch is None:
            num_items_in_batch = self.count_positions(batch).clamp_min(1)
        # DDP averages gradients over processes; the sum over all tokens is wanted.
        scale = self.args.world_size / num_items_in_batch
        counted = self._captured.pop(id(batch), None)
        captured = self.capture(inputs) if counted is None else counted[1]
        layers, losses = list(captured), dict[str, Tensor]()
        for layer in layers:
            x, y = captured.pop(layer)
            mask = self._mask(inputs, x)
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                of_layer, of_router = self._as_forward(model, self._all_losses, layer, x, y, mask)
            of_layer = LayerLosses(*of_layer)
            loss = scale * sum(of_layer) + of_router
            self.accelerator.backward(loss)  # not of the mean: a layer learns alike whichever others learn beside it
            losses[f"layer_{layer}/loss"] = scale * of_layer.distillation.detach()
        mean = torch.stack([*losses.values()]).mean()
        self.add_losses(losses if len(layers) > 1 else {"loss": mean})
        return mean

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; a ValueError if FSDP or DeepSpeed is enabled and `auxiliary_weight` is not 0."""
        if len(self.auxiliary) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("FSDP and DeepSpeed do not train an auxiliary transcoder: set auxiliary_weight to 0")
        self._captured.clear()  # a training that failed leaves some
        with self.auxiliary.attached(self.model):
            return super().train(*args, **kwargs)

    def init_weights(self) -> None:
        """Calibrate, and initialise layers and auxiliary transcoders unless `warm_start` is set."""
        args = self.args
        from_data = args.gate_init == "data" and not args.warm_start
        experts = max(self.model.config.layer(layer).num_experts for layer in self.model.config.layers)
        calibrations = self.calibrate(max(self.calibration_tokens(), experts if from_data else 0))
        self.auxiliary.reset_parameters()
        if not args.warm_start:
            init_decomposition(self.model, self.teacher, calibrations, args, self.shows_progress)
            if args.encoder_init == args.decoder_init == "pretrained":
                several = [i for i in self.model.config.layers if self.model.layer(i).num_output_layers > 1]
                fitted = {i: self.least_norm(i) for i in several if isinstance(self.model.layer(i), MxDLayer)}
                count = -(-self.calibration_tokens() // self._batch_tokens) if fitted else 0
                fit_later_outputs(self.model, self.capture, islice(self.training_batches(), count), fitted)

    def expert_directions(self) -> tuple[dict[int, Tensor] | None, str]:
        """Return the decoders of the auxiliary transcoders, those of the checkpoint that the training ended with."""
        if not len(self.auxiliary):
            return super().expert_directions()
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best is not None:
            self.auxiliary.load(Path(best))
        return self.auxiliary.decoders(), "auxiliary transcoder"

    def trained_modules(self, layer: int) -> dict[str, nn.Module]:
        """Return the layer itself and its auxiliary transcoder."""
        auxiliary = self.auxiliary.of_layer(layer)
        return super().trained_modules(layer) | ({} if auxiliary is None else {f"{AUXILIARY}.": auxiliary})

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the formula of transformers, 6 per parameter and token, is not that of a sparse layer."""
        return 0

    def save_training_state(self, checkpoint: Path) -> None:
        """Write also the auxiliary transcoders."""
        super().save_training_state(checkpoint)
        self.auxiliary.save(checkpoint)

    def load_training_state(self, checkpoint: Path) -> None:
        """Read also the auxiliary transcoders."""
        super().load_training_state(checkpoint)
        self.auxiliary.load(checkpoint)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return per row and layer the sum of the tokens' normalised errors and their number, both (rows, layers)."""
        inputs = self.prepare_batch(inputs)
        rows = len(next(iter(inputs.values())))
        sums: list[Tensor] = []
        counts: list[Tensor] = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for layer, (x, y) in self.capture(inputs).items():
                mask = self._mask(inputs, x) & y.any(-1)  # a token with y = 0 has no normalised error
                errors = normalised_error(model(x, layer=layer).output, y).where(mask, 0.0)
                # A layer that runs several times has the runs one after another.
                sums.append(errors.reshape(-1, rows, x.shape[1]).sum((0, 2)))
                counts.append(mask.reshape(-1, rows, x.shape[1]).sum((0, 2)))
        return None, torch.stack(sums, dim=1), torch.stack(counts, dim=1)


def check_layers(config: MxDConfig, teacher: PreTrainedModel, args: DistillationArguments) -> list[MLPSite]:
    """Return the MLPs that a decomposition's layers read.

    Raises:
        SurgeryError: the teacher has no such layer, or one of other widths, also among those that layers write to.
        ValueError: the encoder is initialised from a pretrained MLP of another form or width.
    """
    found = find_mlps(teacher, **config.where)
    sites = []
    for index in config.layers:
        layer = config.layer(index)
        site, *others = written_sites(found, index, layer.num_output_layers)
        sites.append(site)
        check_widths([site, *others], layer)
        if layer.method == "mxd" and args.encoder_init == "pretrained" and not args.warm_start:
            check_encoder_init(layer, site)
    return sites


def _check_cached(activations: ActivationCache, model: MxDModel) -> None:
    config, manifest = model.config, activations.manifest
    cached = {name: manifest[name] for name in config.where}
    written = config.written_layers()
    if config.where != cached or not set(written) <= set(manifest["layers"]):
        raise ValueError(
            f"the activation cache has layers {manifest['layers']} of {cached}, and the decomposition has layers "
            f"{written} of {config.where}"
        )


def _relative_errors(prediction: Tensor, target: Tensor, mask: Tensor, minimum_squared_norm: float) -> Tensor:
    """Return ‖ŷ − y‖² / max(‖y‖², m) of every token, (..., O) → (...), and 0 outside of the mask (...)."""
    least = max(minimum_squared_norm, torch.finfo(torch.float32).tiny)
    target = target.float()
    errors = (prediction.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(least)
    return errors.where(mask, 0.0)


def normalised_errors(prediction: EvalPrediction, layers: Sequence[int]) -> dict[str, float]:
    """Return the NMSE of every layer over all rows of `prediction_step`, as `layer_8/nmse`, and their mean, which is
    also the loss, by which the best checkpoint is chosen."""
    sums, counts = (torch.as_tensor(part).double().sum(0) for part in prediction)
    errors = sums / counts
    mean = float(errors.mean())
    of_layers = {f"layer_{layer}/nmse": float(error) for layer, error in zip(layers, errors, strict=True)}
    return of_layers | {"nmse": mean, "loss": mean}

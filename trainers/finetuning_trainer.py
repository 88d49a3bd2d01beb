"""End-to-end fine-tuning: train a decomposition inside its language model, on the model's predictions.

In a step the untouched model runs on the token ids (the same model with its own MLPs restored), then the spliced one.
The divergence of their next-token distributions, or the cross-entropy of the text, is propagated through the frozen
model into the decomposition's layers. The layers' own errors are added, so that they stay faithful to their MLPs. The
Trainer's model is the spliced language model, of which only the decomposition is trained and saved.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mxd.base.capture import Activations, capture_layers
from mxd.base.forward import Batch, capture_with_output, check_predictions, right_padded
from mxd.base.masks import next_token_mask, token_mask
from mxd.data.packing import CausalCollator
from mxd.evaluation import kl_divergence, next_token_loss

from .chunked_logits import LanguageModelHead, chunked_sum
from .decomposition_trainer import DecompositionTrainer
from .distillation_trainer import DistillationTrainer
from .finetuning_arguments import FinetuningArguments


class FinetuningTrainer(DecompositionTrainer):
    """Train the decomposition of a spliced language model end to end.

    The base runs as in evaluation, without dropout; its weights are frozen. The decomposition is trained and saved in
    float32, whatever the base's dtype.

    Args:
        model: A causal language model with a decomposition spliced in permanently, as `AutoModelForCausalLM` loads it
            from a decomposition's repo, or as `make_spliced` makes it.
        args: A `FinetuningArguments`.
        train_dataset, eval_dataset: Rows with `input_ids` (and `attention_mask` if there is padding).
        **kwargs: As for `transformers.Trainer`.

    Raises:
        ValueError: No decomposition is spliced into the model, an adapter wraps one of its layers, or the model's
            predictions mean nothing.
    """

    args: FinetuningArguments
    progress_name = "finetune"

    def __init__(self, model: PreTrainedModel, args: FinetuningArguments, **kwargs: Any):
        decomposition = getattr(model, "decomposition", None)  # the class may be a copy that came with the repo
        if decomposition is None:
            raise ValueError(
                f"no decomposition is spliced into this {type(model).__name__}: load a decomposition's repo by "
                "AutoModelForCausalLM, or use make_spliced"
            )
        check_predictions(model, "fine-tuning")
        try:
            with model.untouched():
                pass
        except ValueError as error:  # the SurgeryError of a class that may be a copy
            adapter = "an adapter on the modulation, which wraps its layer, trains with transformers' own Trainer"
            raise ValueError(f"the untouched model cannot be compared with ({error}): {adapter}") from error
        trained = {parameter: parameter.requires_grad for parameter in decomposition.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(trained.get(parameter, False))
        decomposition.float()
        self.language_model = model
        if any(module.router is not None for module in decomposition.layers.values()):
            args.ddp_find_unused_parameters = False  # the routers' loss is no output of the model's forward
        kwargs.setdefault("compute_metrics", self.prediction_losses)
        super().__init__(model, decomposition, args, **kwargs)
        _disable_dropout(model)
        self.head = LanguageModelHead(model)

    def capture(self, inputs: Mapping[str, Tensor]) -> Activations:
        """Return {layer: (x, y)} of the untouched model's MLPs for a batch of ids; x (batch, tokens, I), y (…, O)."""
        batch = inputs["input_ids"], inputs.get("attention_mask")
        with self.model.untouched():
            return capture_layers(self.model, self.decomposition.config, *batch)

    def loss_mask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the predictions that the loss includes, (batch, tokens − 1) bool."""
        return next_token_mask(super().loss_mask(inputs))

    @staticmethod
    def kl_loss(logits: Tensor, reference: Tensor) -> Tensor:
        """Return Σ_t KL(untouched ‖ spliced) = Σ_t Σ_v p_tv (log p_tv − log q_tv), in nats; a scalar in float32.

        q is the softmax of the spliced model's `logits` (..., vocabulary), p of the untouched model's `reference`.
        """
        return kl_divergence(reference.float().log_softmax(-1), logits.float().log_softmax(-1)).sum()

    @staticmethod
    def cross_entropy_loss(logits: Tensor, targets: Tensor) -> Tensor:
        """Return Σ_t −log q_t(next token), in nats; a scalar in float32.

        q is the softmax of the spliced model's `logits` (..., vocabulary); `targets` (...) are the next tokens' ids.
        """
        return next_token_loss(logits.float().log_softmax(-1), targets).sum()

    @cached_property
    def _never_padded(self) -> bool:
        """Whether all training rows are known to have one length, as those of `pack` have."""
        features = getattr(self.train_dataset, "features", None)
        if not isinstance(features, Mapping) or "attention_mask" in features:
            return False
        return isinstance(self.data_collator, CausalCollator) and getattr(features.get("input_ids"), "length", -1) > 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the predictions' mean loss, plus `nmse_weight` times the layers' error, plus the routers' loss."""
        loss = sum(self.loss_terms(model, inputs, num_items_in_batch))
        return (loss, {}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of every term in turn; returns their sum, the micro-batch's part of the step's loss.

        Beside the graph of the whole model, that of one layer's own error only is in memory at a time.
        """
        if callable(start := getattr(self.optimizer, "train", None)):  # one without a schedule
            start()
        total = torch.zeros((), device=self.args.device)
        for term in self.loss_terms(model, self._prepare_inputs(inputs), num_items_in_batch):
            self.accelerator.backward(term)
            total += term.detach()
        self.add_losses({"loss": total})
        return total

    def loss_terms(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Iterator[Tensor]:
        """Yield the terms of the loss: first the error of every layer, if it counts, then that of the predictions."""
        _disable_dropout(self.model)
        ids, attention_mask = batch = right_padded(inputs, self.args.device)
        mask = next_token_mask(token_mask(ids, attention_mask))
        predictions = mask.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        scale = self.args.world_size / predictions  # DDP averages gradients; the sum over all tokens is wanted
        reference, captured = self._untouched(batch)
        yield from self._layer_terms(captured, mask, scale)
        function = self._cross_entropy_of_hidden if reference is None else self._kl_of_hidden
        target, hidden = ids[:, 1:] if reference is None else reference, self.head.hidden(model, *batch)[:, :-1]
        if self._never_padded:  # a boolean index waits for a GPU
            target, hidden = target.flatten(0, 1), hidden.flatten(0, 1)
        else:
            target, hidden = target[mask], hidden[mask]
        loss = scale * chunked_sum(function, self.head.chunk, hidden, target)
        if self.routed_layers and self.args.world_size > 1:
            # DDP averages the gradients of the last backward pass, of which the routers must be a part.
            routers = [one.sum() for name, one in self.decomposition.named_parameters() if ".router." in name]
            loss = loss + 0 * torch.stack(routers).sum()
        yield loss

    def _layer_terms(self, captured: Activations, mask: Tensor, scale: Tensor | float) -> Iterator[Tensor]:
        """Yield `nmse_weight` times every layer's part of the mean Σ_t ‖ŷ − y‖² / ‖y‖² on untouched activations, and
        of the routers' mean loss."""
        mask, count = F.pad(mask, (0, 1)), len(captured)  # (batch, tokens): the last position predicts nothing
        for layer in list(captured):
            x, y = captured.pop(layer)
            output, least = self.decomposition.layer(layer)(x), self.least_norm(layer)
            error = DistillationTrainer.distillation_loss(output, y, mask, minimum_squared_norm=least)
            yield (self.args.nmse_weight * scale * error + self.router_loss(layer, x, mask)) / count

    def _untouched(self, batch: Batch) -> tuple[Tensor | None, Activations]:
        """Return `_reference` if the loss is KL, and `capture` if a loss reads it, from one forward pass."""
        captured: Activations = {}

        def run(**inputs: Any) -> Any:
            found, output = capture_with_output(self.model, self.decomposition.config, **inputs)
            captured.update(found)
            return output

        reads_layers = self.args.nmse_weight or self.routed_layers
        if self.args.loss == "kl":
            return self._reference(batch, run if reads_layers else self.model), captured
        inputs = dict[str, Any](input_ids=batch[0], attention_mask=batch[1])
        return None, self.capture(inputs) if reads_layers else {}

    @torch.no_grad()
    def _reference(self, batch: Batch, run: Callable[..., Any]) -> Tensor:
        """Return the untouched model's last hidden states that predict a token, (batch, tokens − 1, hidden)."""
        with self.model.untouched():
            return self.head.hidden(run, *batch)[:, :-1]

    def _kl_of_hidden(self, hidden: Tensor, reference: Tensor) -> Tensor:
        return self.kl_loss(self.head.logits(hidden), self.head.logits(reference))

    def _cross_entropy_of_hidden(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.cross_entropy_loss(self.head.logits(hidden), targets)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return per row the sums of KL and cross-entropy (rows, 2), and the number of predictions (rows)."""
        ids, attention_mask = batch = right_padded(inputs, self.args.device)
        masks = next_token_mask(token_mask(ids, attention_mask))
        sums = torch.zeros(len(ids), 2, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            reference, hidden = self._reference(batch, self.model), self.head.hidden(model, *batch)[:, :-1]
            for row, mask in enumerate(masks):
                prediction, chunk = hidden[row][mask], self.head.chunk
                sums[row, 0] = chunked_sum(self._kl_of_hidden, chunk, prediction, reference[row][mask])
                sums[row, 1] = chunked_sum(self._cross_entropy_of_hidden, chunk, prediction, ids[row, 1:][mask])
        return None, sums, masks.sum(-1)

    def prediction_losses(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return KL and cross-entropy over all rows of `prediction_step`, and as loss the one that is trained on."""
        sums, predictions = (torch.as_tensor(value).double() for value in prediction)
        kl, cross_entropy = (sums.reshape(len(predictions), -1).sum(0) / predictions.sum()).tolist()
        return {"loss": kl if self.args.loss == "kl" else cross_entropy, "kl": kl, "cross_entropy": cross_entropy}


def _disable_dropout(model: nn.Module) -> None:
    """Put a model into eval mode. Layers that checkpoint activations need training mode; their dropout rates are set
    to 0 (OPT: `F.dropout(x, self.dropout, self.training)`)."""
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)

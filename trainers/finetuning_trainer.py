"""End-to-end fine-tuning: train a decomposition inside its language model, on what the model predicts.

A step: the untouched model runs on the token ids (the same model, with its own MLPs put back for the moment: no second
copy of the weights), then the spliced one; the divergence of their next-token distributions, or else the cross-entropy
of the text, goes back through the frozen model into the decomposition's layers. The layers' own errors are added, so
that they do not gain on the prediction what they lose on the MLPs that they stand for. The Trainer's model is the
spliced language model, of which only the decomposition is trained and saved.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mxd.base.capture import capture_mlps
from mxd.base.forward import Batch, right_padded
from mxd.base.masks import next_token_mask, token_mask
from mxd.evaluation import kl_divergence, next_token_loss

from .chunked_logits import LanguageModelHead, chunked_sum
from .decomposition_trainer import DecompositionTrainer
from .distillation_trainer import DistillationTrainer
from .finetuning_arguments import FinetuningArguments


class FinetuningTrainer(DecompositionTrainer):
    """Trains the decomposition of a spliced language model end to end.

    The base runs as in evaluation, without dropout; its weights are frozen. The decomposition is trained, and saved, in
    float32, whatever the base's dtype.

    Args:
        model: a causal language model with a decomposition spliced in for good, as `AutoModelForCausalLM` loads it from
            a decomposition's repo, or as `make_spliced` makes it.
        args: a `FinetuningArguments`.
        train_dataset, eval_dataset: rows with `input_ids` (and `attention_mask` where there is padding).
        **kwargs: as for `transformers.Trainer`.

    Raises:
        ValueError: when no decomposition is spliced into the model.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("user/mxd-gpt2-l8")  # doctest: +SKIP
        >>> FinetuningTrainer(model, args, train_dataset=rows).train()  # doctest: +SKIP
    """

    args: FinetuningArguments
    progress_name = "finetune"

    def __init__(
        self,
        model: PreTrainedModel,
        args: FinetuningArguments,
        compute_metrics: Any = None,
        **kwargs: Any,
    ):
        # Told by what it has, not by its class: the code may have come with the repo.
        decomposition = getattr(model, "decomposition", None)
        if decomposition is None:
            raise ValueError(
                f"no decomposition is spliced into this {type(model).__name__}: load it by "
                "AutoModelForCausalLM.from_pretrained(<decomposition>), or use make_spliced(model, decomposition, name)"
            )
        trained = {id(parameter) for parameter in decomposition.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in trained:
                parameter.requires_grad_(False)
        decomposition.float()
        super().__init__(
            model, decomposition, args, compute_metrics=compute_metrics or self.prediction_losses, **kwargs
        )
        _without_dropout(model)
        self.head = LanguageModelHead(model)

    def capture(self, inputs: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """{layer: (x, y)} of the untouched model's MLPs for a batch of ids; x (batch, tokens, I), y (…, O)."""
        config = self.decomposition.config
        with self.model.untouched():
            return capture_mlps(
                self.model, config.layers, inputs["input_ids"], inputs.get("attention_mask"), **config.where
            )

    def loss_mask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Which predictions the loss is of: (batch, tokens − 1)."""
        return next_token_mask(super().loss_mask(inputs))

    @staticmethod
    def kl_loss(logits: Tensor, reference: Tensor) -> Tensor:
        """Σ_t KL(untouched ‖ spliced) = Σ_t Σ_v p_tv (log p_tv − log q_tv), nats.

        Args:
            logits: the spliced model's, (..., vocabulary); q is their softmax.
            reference: the untouched model's, (..., vocabulary); p is their softmax.

        Returns:
            A scalar in float32.
        """
        return kl_divergence(reference.float().log_softmax(-1), logits.float().log_softmax(-1)).sum()

    @staticmethod
    def cross_entropy_loss(logits: Tensor, targets: Tensor) -> Tensor:
        """Σ_t −log q_t(next token), nats.

        Args:
            logits: the spliced model's, (..., vocabulary); q is their softmax.
            targets: ids of the next tokens, (...).

        Returns:
            A scalar in float32.
        """
        return next_token_loss(logits.float().log_softmax(-1), targets).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean over the counted predictions of the loss, plus `nmse_weight` times the layers' mean error, plus the loss
        of routers where there are some."""
        _without_dropout(self.model)
        ids, attention_mask = batch = right_padded(inputs, self.args.device)
        counted = next_token_mask(token_mask(ids, attention_mask))
        predictions = counted.sum() if num_items_in_batch is None else num_items_in_batch
        reference = self._reference(batch)[counted] if self.args.loss == "kl" else None
        hidden = self.head.hidden(model, *batch)[:, :-1][counted]
        if reference is not None:
            loss = chunked_sum(self._kl_of_hidden, self.head.chunk, hidden, reference)
        else:
            loss = chunked_sum(self._cross_entropy_of_hidden, self.head.chunk, hidden, ids[:, 1:][counted])
        routers: Tensor | float = 0.0
        if self.args.nmse_weight or self.routed_layers:
            errors, routers = self._distillation_losses(batch, counted)
            loss = loss + self.args.nmse_weight * errors
        # DDP averages gradients over processes; the sum over all tokens is wanted.
        loss = loss / predictions * self.args.world_size + routers
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def _reference(self, batch: Batch) -> Tensor:
        """The untouched model's last hidden states that predictions are made of, (batch, tokens − 1, hidden)."""
        with self.model.untouched():
            return self.head.hidden(self.model, *batch)[:, :-1]

    def _distillation_losses(self, batch: Batch, counted: Tensor) -> tuple[Tensor, Tensor | float]:
        """Mean over layers of the sum of the counted positions' ‖ŷ − y‖² / ‖y‖², on the untouched model's activations,
        as faithfulness is measured; and of the routers' losses, which keep them up with their gates."""
        ids, attention_mask = batch
        inputs = {"input_ids": ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        mask = F.pad(counted, (0, 1))  # (batch, tokens): no prediction counts at the last position
        captured = self.capture(inputs)
        errors = [
            DistillationTrainer.distillation_loss(
                self.decomposition.layer(layer)(x), y, mask, minimum_squared_norm=self.least_norm(layer)
            )
            for layer, (x, y) in captured.items()
        ]
        routers = sum(self.router_loss(layer, x, mask) for layer, (x, _) in captured.items()) / len(captured)
        return torch.stack(errors).mean(), routers

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
        """Per row: the sums of KL and of cross-entropy (rows, 2), and the predictions that count (rows)."""
        ids, attention_mask = batch = right_padded(inputs, self.args.device)
        counted = next_token_mask(token_mask(ids, attention_mask))
        sums = torch.zeros(len(ids), 2, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            reference, hidden = self._reference(batch), self.head.hidden(model, *batch)[:, :-1]
            for row, mask in enumerate(counted):
                prediction, chunk = hidden[row][mask], self.head.chunk
                sums[row, 0] = chunked_sum(self._kl_of_hidden, chunk, prediction, reference[row][mask])
                sums[row, 1] = chunked_sum(self._cross_entropy_of_hidden, chunk, prediction, ids[row, 1:][mask])
        return None, sums, counted.sum(-1)

    def prediction_losses(self, prediction: EvalPrediction) -> dict[str, float]:
        """KL and cross-entropy over all rows, and which of them is trained on as the loss; sums divided once."""
        sums, predictions = (torch.as_tensor(value).double() for value in prediction)
        kl, cross_entropy = (sums.reshape(len(predictions), -1).sum(0) / predictions.sum()).tolist()
        return {"loss": kl if self.args.loss == "kl" else cross_entropy, "kl": kl, "cross_entropy": cross_entropy}


def _without_dropout(model: nn.Module) -> None:
    """Eval mode, but for the layers that checkpoint their activations, which they do in training mode alone. The rates
    that those read themselves (OPT: `F.dropout(x, self.dropout, self.training)`) are set to 0."""
    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)

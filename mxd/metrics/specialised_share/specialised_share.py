"""Share of what a layer explains that its specialised experts carry, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
(e_mean − e) / (1 − e), where e is the normalised error of the layer and e_mean the same with the specialised experts
replaced by their mean coefficients. A specialised expert is active on at most a quarter of the training tokens. The
share has no upper bound; `clipped_specialised_share` counts the error of a token at most 1 and is at most 1.
"""
_INPUTS = """
Args:
    predictions: output of the layer that replaces the MLP, one row of numbers per token.
    references: output of the MLP, of the same shape.
    ablated: output of the layer with the specialised experts replaced by their mean, of the same shape.
Returns:
    specialised_share, clipped_specialised_share: NaN if e ≥ 1.
"""


class SpecialisedShare(evaluate.Metric):
    """Specialised share, see https://arxiv.org/abs/2505.21364 for the layer."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float64"))
        features = datasets.Features({"predictions": row, "references": row, "ablated": row})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

    def _compute(self, predictions, references, ablated):
        errors, without = (token_errors(output, references) for output in (predictions, ablated))
        return {
            "specialised_share": share(errors, without),
            "clipped_specialised_share": share(np.minimum(errors, 1), np.minimum(without, 1)),
        }


def token_errors(predictions, references):
    """Return ‖ŷ_t − y_t‖² / ‖y_t‖² of every token with y_t ≠ 0."""
    prediction, target = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    norms = np.square(target).sum(-1)
    return np.square(prediction - target).sum(-1)[norms > 0] / norms[norms > 0]


def share(errors, without):
    """Return the share of the explained error that is lost without some experts."""
    error = errors.mean() if len(errors) else 1.0
    return float((without.mean() - error) / (1 - error)) if error < 1 else float("nan")

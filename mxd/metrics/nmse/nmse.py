"""Normalised mean squared error of a layer that replaces an MLP, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Mean over tokens of ‖ŷ − y‖² / ‖y‖²: 0 for an exact output, 1 for an output of zero. Tokens with y = 0 do not count.
`clipped_nmse` counts the error of a token at most 1.
"""
_INPUTS = """
Args:
    predictions: output ŷ of the layer that replaces the MLP, one row of numbers per token.
    references: output y of the MLP, of the same shape.
Returns:
    nmse, clipped_nmse: NaN without a token with y ≠ 0.
"""


class NMSE(evaluate.Metric):
    """NMSE of Oldfield et al., https://arxiv.org/abs/2505.21364."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float64"))
        features = datasets.Features({"predictions": row, "references": row})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

    def _compute(self, predictions, references):
        errors = token_errors(predictions, references)
        if not len(errors):
            return {"nmse": float("nan"), "clipped_nmse": float("nan")}
        return {"nmse": float(errors.mean()), "clipped_nmse": float(np.minimum(errors, 1).mean())}


def token_errors(predictions, references):
    """Return ‖ŷ_t − y_t‖² / ‖y_t‖² of every token with y_t ≠ 0."""
    prediction, target = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    norms = np.square(target).sum(-1)
    return np.square(prediction - target).sum(-1)[norms > 0] / norms[norms > 0]

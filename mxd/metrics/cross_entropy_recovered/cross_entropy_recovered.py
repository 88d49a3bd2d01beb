"""Share of the cross-entropy that a layer recovers in the place of an MLP, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
(CE_zero − CE_spliced) / (CE_zero − CE_untouched): 1 if the model predicts as well as with its own MLP, 0 if as badly
as with an output of zero in its place. It is NaN if that output raises the cross-entropy by less than 0.01 nats per
token, because noise would decide.
"""
_INPUTS = """
Args:
    predictions: losses −log p(next token) of the spliced model, one number per token, in nats.
    references: losses of the untouched model on the same tokens.
    zero_ablated: losses of the model with an output of zero in the MLP's place.
Returns:
    recovered: the share.
    rise: CE_spliced − CE_untouched.
"""
LEAST_ABLATION_RISE = 0.01


class CrossEntropyRecovered(evaluate.Metric):
    """Cross-entropy recovered."""

    def _info(self):
        loss = datasets.Value("float64")
        features = datasets.Features({"predictions": loss, "references": loss, "zero_ablated": loss})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

    def _compute(self, predictions, references, zero_ablated):
        spliced, untouched, zero = (float(np.mean(losses)) for losses in (predictions, references, zero_ablated))
        known = zero - untouched >= LEAST_ABLATION_RISE
        recovered = (zero - spliced) / (zero - untouched) if known else float("nan")
        return {"recovered": recovered, "rise": spliced - untouched}

"""Help texts of training arguments that are also options of the commands, written once for both.

This module imports nothing, so that `mxd decompose --help` needs no torch.
"""

HELP = {
    "learning_rate": "Peak learning rate, in units of the scaled activations (paper: 1e-4 for 480 M tokens).",
    "gate_init": "Init of the gate. 'data': rows point to training inputs; 'random': nn.Linear (paper).",
    "encoder_init": "Init of an MxD's encoder. 'pretrained': the MLP's own; 'random': nn.Linear (paper).",
    "modulation_init": (
        "Init of an MxD's modulations C. 'unit': C^T a is about 1, the layer about D^T z; 'random': around 0 (paper)."
    ),
    "min_mean_ablation_error": (
        "Penalise an MxD layer while its mean-ablated error (C^T a replaced by its mean; at most 1 per token)"
        " is below this target. About the share of the output that the experts then carry."
    ),
    "auxiliary_weight": (
        "Weight of the auxiliary loss: a throw-away skip-transcoder decoder (N * O parameters) reads the "
        "gate, so that coefficients must also predict the output on their own. 0 disables it (paper)."
    ),
    "loss": "Loss. 'kl': divergence from the untouched model; 'cross_entropy': of the next token.",
    "nmse_weight": "Weight of the layers' own error |y^ - y|^2 / |y|^2, which keeps them faithful.",
}

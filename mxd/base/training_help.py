"""Help texts of training arguments that are also options of the commands, written once for both.

This module imports nothing, so that `mxd decompose --help` needs no torch.
"""

HELP = {
    "learning_rate": "Peak learning rate, in units of the scaled activations. The authors use 1e-4 for 480M tokens.",
    "gate_init": "'data': gate rows are training inputs; 'random': as nn.Linear (the authors).",
    "encoder_init": "'pretrained': the MLP's own encoder; 'random': as nn.Linear (the authors).",
    "modulation_init": "'unit': C^T a starts at 1, so the layer starts at D^T z; 'random': around 0 (the authors).",
    "min_mean_ablation_error": (
        "Penalise the layer while its error, with C^T a replaced by its mean, is below this value, so that experts do "
        "not stay idle; 0 for none."
    ),
    "auxiliary_weight": (
        "Weight of the auxiliary loss: a throw-away decoder must predict the MLP's output from the coefficients alone; "
        "0 for none."
    ),
    "loss": "'kl': KL divergence to the untouched model; 'cross_entropy': loss of the next token.",
    "nmse_weight": "Weight of the layers' own normalised error, added to the loss so that layers stay faithful.",
}

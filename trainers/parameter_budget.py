"""Numbers of experts that match a transcoder's parameters (paper, appendix on parameter matching).

Symbols: I input width, O output width, H hidden units of the MxD's encoder, N experts, m·I latents.
"""


def transcoder_parameters(hidden_size: int, output_size: int, num_latents: int) -> int:
    """Return the parameters of a transcoder: weights L(I + O), latent bias L, output bias O."""
    return num_latents * (hidden_size + output_size) + num_latents + output_size


def num_experts_matching_transcoder(
    hidden_size: int, output_size: int, intermediate_size: int, multiplier: int, encoder_type: str
) -> int:
    """Return the number of experts of an MxD with the parameters of a transcoder of mI latents.

        MLP form:  N = [ P - H(I + O) - mI - O ] / (I + O + 1)
        GLU form:  N = [ P - 2H(I + 1) - O(H + 1) ] / (I + O + 1)

    The MLP form counts the encoder's bias as mI instead of H, as the authors' code does: GPT-2 at m = 32 then
    has the published 21,490 experts (exactly matched it would be 21,504).

    Raises:
        ValueError: The budget does not suffice for the encoder and one expert.
    """
    budget = transcoder_parameters(hidden_size, output_size, multiplier * hidden_size)
    if encoder_type == "glu":
        rest = budget - 2 * intermediate_size * (hidden_size + 1) - output_size * (intermediate_size + 1)
    else:
        rest = budget - intermediate_size * (hidden_size + output_size) - multiplier * hidden_size - output_size
    num_experts = rest // (hidden_size + output_size + 1)
    if num_experts < 1:
        raise ValueError(
            f"a transcoder of {multiplier} x {hidden_size} latents has too few parameters for an encoder of "
            f"intermediate_size {intermediate_size} and one expert: raise the multiplier"
        )
    return num_experts


def num_latents_matching_transcoder(hidden_size: int, output_size: int, multiplier: int, skip: bool) -> int:
    """Return the latents of a (skip) transcoder with the parameters of a transcoder of mI latents."""
    latents = multiplier * hidden_size
    if skip:
        latents -= -(-hidden_size * output_size // (hidden_size + output_size + 1))
    if latents < 1:
        raise ValueError(f"multiplier {multiplier} leaves no latent beside the skip matrix: raise it")
    return latents

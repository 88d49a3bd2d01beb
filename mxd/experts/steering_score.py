"""Steering score: does a feature's direction move a model's predictions towards what follows the feature's contexts?

The direction v is added to the MLP's output of the untouched model at every position, s · v, with s such that

    mean over prompts of KL(untouched ‖ steered) at the next token = `kl`.

At this equal strength the score of a feature n is the mean rise of the log-probability of its targets T_n, the tokens
that follow the contexts in which it is most active:

    r_n(T) = mean over prompts, t ∈ T of  log p_steered(t) − log p_untouched(t)

    percentile among random directions   share of random directions d, at the same KL, with r_d(T_n) < r_n(T_n)
    percentile among targets             share of other features m with r_n(T_m) < r_n(T_n)

Both are 0.5 by chance. The cost is what the steered continuations lose in log-likelihood, in nats per token, under the
untouched model.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxd.base.capture import capture_mlps
from mxd.base.forward import batch_for, check_causal, check_predictions, evaluating
from mxd.base.progress import progress_bar
from mxd.evaluation.metrics import kl_divergence
from mxd.modeling_mxd import MLPSite, find_mlp

from .feature_contexts import FeatureContexts
from .meaning import mean_interval

Push = Callable[[Tensor, Tensor], Tensor]
"""A function from the MLP's input x (rows, tokens, I) and the number of each row's direction (rows) to the vector added
to its output per unit of strength: (rows, tokens, O), or (rows, 1, O)."""
MOVES_ABOVE = 0.95
_TOLERANCE, _TRIES, _STEP = 0.03, 20, 4.0
_BASELINES = 8  # continuations of each prompt without steering


class Steered(NamedTuple):
    """Effects of D directions at equal KL."""

    strengths: Tensor
    """(D), s"""
    kl: Tensor
    """(D), within 3 % of the one asked for, unless a direction cannot reach it"""
    rise: Tensor
    """(D, vocabulary), mean over prompts of log p_steered − log p_untouched"""
    loss: Tensor
    """(D), nats per token that steered continuations lose under the untouched model"""


def steering_score(
    model: nn.Module,
    layer: int,
    contexts: FeatureContexts,
    directions: Tensor | Push,
    prompts: Tensor,
    controls: Steered,
    *,
    examples: int = 16,
    **how: Any,
) -> dict[str, Any]:
    """Measure whether features steer towards the contexts in which they are active; see the module's docstring.

    Args:
        model: the base model, untouched.
        layer: index of the layer of the MLP.
        contexts: from `collect_contexts`.
        directions: of every feature of the representation, (N, O); or a function from x and features, see `Push`.
        prompts: token ids of prompts of equal length, (prompts, tokens).
        controls: `steer_prompts` by `random_directions`, for the same prompts; one pool serves all methods.
        examples: contexts of a feature; the tokens that follow them are its targets.
        **how: options of `steer_prompts`.

    Returns:
        `features`: for each feature its index, `strength`, `strength_of_maximum` (in units of its largest value in the
        text), `kl`, `rise`, `percentile_random`, `percentile_targets`, `loss`. `moves`: share of features above 95 % of
        the random directions, with its Wilson interval. `percentile_random`, `percentile_targets`, `loss`,
        `control_loss`: mean and interval.

    Raises:
        ValueError: a feature has no context with a next token, or no direction.
    """
    features = torch.tensor(contexts.features)
    targets = [_targets(contexts, index, examples) for index in range(len(features))]
    push = _push(directions)

    def push_feature(x: Tensor, numbers: Tensor) -> Tensor:
        return push(x, features.to(numbers.device)[numbers])

    steered = steer_prompts(model, layer, push_feature, prompts, len(features), **how)
    return _report(contexts, targets, steered, controls)


def _report(contexts: FeatureContexts, targets: list[Tensor], steered: Steered, controls: Steered) -> dict[str, Any]:
    """Return the scores of F features whose directions are those of `steered`, given the targets of each."""
    rises, of_controls = (
        torch.stack([found.rise[:, ids].mean(1) for ids in targets], dim=1) for found in (steered, controls)
    )  # (F, F) and (D, F): a row for each direction, a column for each feature's targets
    own = rises.diagonal()
    random = _below(of_controls, own).mean(0)
    # Without itself, which counts as a tie; not a number for a single feature.
    among = (_below(rises, own[:, None]).sum(1) - 0.5) / (len(own) - 1)
    largest = torch.tensor([float(values.max()) for _, _, values in contexts.places])
    columns = {
        "strength": steered.strengths, "strength_of_maximum": steered.strengths / largest, "kl": steered.kl,
        "rise": own, "percentile_random": random, "percentile_targets": among, "loss": steered.loss,
    }  # fmt: skip
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    moved = int((random > MOVES_ABOVE).sum())
    return {
        "features": [
            {"feature": feature, **dict(zip(columns, row, strict=True))}
            for feature, row in zip(contexts.features, rows, strict=True)
        ],
        "moves": {"mean": moved / len(own), "interval": wilson_interval(moved, len(own))},
        "percentile_random": mean_interval(random.numpy()),
        "percentile_targets": mean_interval(among.numpy()),
        "loss": mean_interval(steered.loss.numpy()),
        "control_loss": mean_interval(controls.loss.numpy()),
    }


def random_directions(count: int, width: int, seed: int = 0) -> Tensor:
    """Return directions that are uniform on the unit sphere, (count, width)."""
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def wilson_interval(successes: int, total: int) -> list[float]:
    """Return the 95 % interval of a share, Wilson's, which holds for shares near 0 and 1 too."""
    z, share = NormalDist().inv_cdf(0.975), successes / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return [(middle + sign * half) / (1 + z * z / total) for sign in (-1, 1)]


@torch.no_grad()
def steer_prompts(
    model: nn.Module,
    layer: int,
    directions: Tensor | Push,
    prompts: Tensor,
    count: int | None = None,
    *,
    kl: float = 0.5,
    new_tokens: int = 20,
    seed: int = 0,
    stack: str | None = None,
    site: str = "mlp",
    batch_tokens: int = 2048,
    progress: bool = False,
) -> Steered:
    """Steer prompts by each direction alone, at a strength with equal KL; then continue the steered prompts.

    Args:
        model, layer, prompts: see `steering_score`.
        directions: (D, O), or a function; see `Push`.
        count: D, if `directions` is a function.
        kl: mean KL to the untouched next-token distributions, in nats.
        new_tokens: tokens of a continuation, sampled at temperature 1; fewer than 1 leaves `loss` NaN.
        seed: seed of the continuations.
        stack, site: see `find_mlps`.
        batch_tokens: tokens in a forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: a direction is 0 on the prompts, or the model is no causal language model with pretrained weights.
    """
    check_causal(model)
    check_predictions(model, "steering")
    number = len(directions) if isinstance(directions, Tensor) else count
    if number is None:
        raise ValueError("count must say how many directions the function has")
    ids, _ = batch_for(model, {"input_ids": prompts})
    size = max(1, batch_tokens // ids.numel())
    with evaluating(model), progress_bar(total=number, desc="steer", show=progress) as bar:
        steering = _Steering(model, find_mlp(model, layer, stack, site), _push(directions), ids)
        strengths = steering.first_strengths(torch.arange(number), size)
        reached, rise = torch.zeros(number), torch.zeros(number, steering.untouched.shape[-1])
        low, high = torch.zeros(number), torch.full((number,), torch.inf)
        active = torch.arange(number)
        for _ in range(_TRIES):
            for part in active.split(size):
                reached[part], rise[part] = steering.effect(part, strengths[part])
            done = (reached[active] / kl - 1).abs() < _TOLERANCE
            bar.update(int(done.sum()))
            if not len(active := active[~done]):
                break
            strengths[active] = _next_strengths(strengths[active], reached[active], kl, low, high, active)
        loss = torch.full((number,), torch.nan)
        if new_tokens > 0:
            size = max(1, batch_tokens // (ids.numel() + new_tokens * len(ids)))
            nothing = torch.zeros(min(size, _BASELINES))
            plain = steering.likelihood(nothing.long(), nothing, new_tokens, seed).mean()
            for part in torch.arange(number).split(size):
                loss[part] = plain - steering.likelihood(part, strengths[part], new_tokens, seed)
    return Steered(strengths, reached, rise, loss)


def _next_strengths(strengths: Tensor, reached: Tensor, kl: float, low: Tensor, high: Tensor, active: Tensor) -> Tensor:
    """Return the next strengths to try, with KL about proportional to s², inside the brackets, which are updated."""
    over = ~(reached < kl)  # NaN is too much
    high[active] = torch.where(over, strengths.minimum(high[active]), high[active])
    low[active] = torch.where(over, low[active], strengths.maximum(low[active]))
    ratio = kl / reached.clamp_min(torch.finfo(reached.dtype).tiny)  # rounding makes a KL of 0 negative, too
    guess = strengths * ratio.sqrt().nan_to_num(0.0).clamp(1 / _STEP, _STEP)
    inside = (guess > low[active]) & (guess < high[active])
    return torch.where(inside, guess, (low[active] * high[active]).sqrt())


class _Steering:
    """Prompts (P, tokens) of a model, with one of several vectors added to the output of an MLP in each copy."""

    def __init__(self, model: nn.Module, mlp: MLPSite, push: Push, prompts: Tensor):
        self.model, self.mlp, self.push, self.prompts = model, mlp, push, prompts
        self.untouched = self._log_p(prompts)[:, 0]  # (P, vocabulary)

    def first_strengths(self, numbers: Tensor, size: int) -> Tensor:
        """Return the strength with which each vector is half as long as the MLP's output, (D)."""
        mlp = self.mlp
        x, y = capture_mlps(self.model, [mlp.layer], self.prompts, stack=mlp.stack, site=mlp.name)[mlp.layer]
        lengths = []
        for part in numbers.split(size):
            vectors = self.push(x.repeat(len(part), 1, 1), part.repeat_interleave(len(x)).to(x.device))
            lengths.append(vectors.float().norm(dim=-1).view(len(part), -1).mean(1).cpu())
        length = torch.cat(lengths)
        if not (length > 0).all():
            raise ValueError(f"direction {int((~(length > 0)).nonzero()[0])} is 0: it cannot steer; leave it out")
        return 0.5 * float(y.float().norm(dim=-1).mean()) / length

    def effect(self, numbers: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return KL (B) and rise of log-probabilities (B, vocabulary), means over prompts, of B directions."""
        with self._added(numbers, strengths):
            log_p = self._log_p(self.prompts.repeat(len(numbers), 1)).view(len(numbers), *self.untouched.shape)
        kl = kl_divergence(self.untouched.expand_as(log_p), log_p).mean(1)
        return kl.cpu(), (log_p - self.untouched).mean(1).cpu()

    def likelihood(self, numbers: Tensor, strengths: Tensor, new_tokens: int, seed: int) -> Tensor:
        """Sample a continuation of every prompt, steered by each of B directions.

        Returns the mean log-likelihood of a token under the untouched model, (B).
        """
        ids = self.prompts.repeat(len(numbers), 1)
        # Whatever the model's own generation config says.
        sampling = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
                    "repetition_penalty": 1.0}  # fmt: skip
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
        with torch.random.fork_rng(), self._added(numbers, strengths):
            torch.manual_seed(seed)
            generate: Any = self.model.generate
            text = generate(ids, attention_mask=torch.ones_like(ids), **sampling, **length)
        log_p = self._log_p(text, new_tokens + 1)[:, :-1]
        of_tokens = log_p.gather(-1, text[:, ids.shape[1] :, None])
        return of_tokens.reshape(len(numbers), -1).mean(1).cpu()

    def _log_p(self, ids: Tensor, last: int = 1) -> Tensor:
        """Return log-probabilities of the token after each of the last positions, (rows, last, vocabulary)."""
        keep = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        logits = self.model(input_ids=ids, use_cache=False, **keep).logits[:, -last:]
        return F.log_softmax(logits.float(), dim=-1)

    @contextmanager
    def _added(self, numbers: Tensor, strengths: Tensor) -> Iterator[None]:
        """Add strength times vector to the MLP's output; rows are the prompts of the first direction, and so on."""
        inputs: list[Tensor] = []
        of_rows = numbers.repeat_interleave(len(self.prompts)).to(self.prompts.device)
        scale = strengths.repeat_interleave(len(self.prompts)).to(self.prompts.device)[:, None, None]

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[:] = [args[0] if args else next(iter(kwargs.values()))]

        def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            y: Tensor = output[0] if isinstance(output, tuple) else output
            x = inputs[0].reshape(len(of_rows), -1, inputs[0].shape[-1])
            vectors = (scale * self.push(x, of_rows)).expand(-1, x.shape[1], -1)
            changed = y + vectors.reshape(y.shape).to(y)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles = [
            self.mlp.input_module.register_forward_pre_hook(keep, with_kwargs=True),
            self.mlp.output_module.register_forward_hook(add),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _push(directions: Tensor | Push) -> Push:
    if not isinstance(directions, Tensor):
        return directions
    table = directions.detach().float()
    return lambda x, numbers: table[numbers.to(table.device), None].to(x.device)


def _targets(contexts: FeatureContexts, index: int, examples: int) -> Tensor:
    """Return the tokens that follow the contexts in which a feature is most active."""
    places = [(contexts.rows[row], position + 1) for row, position in contexts.top(index, examples)]
    following = [ids[position] for ids, position in places if position < len(ids)]
    if not following:
        raise ValueError(f"feature {contexts.features[index]} has no context with a next token: leave it out")
    return torch.tensor(following)


def _below(values: Tensor, reference: Tensor) -> Tensor:
    """Return 1 where a value is below its reference, 0.5 where they are equal, else 0."""
    return (values < reference).double() + 0.5 * (values == reference).double()

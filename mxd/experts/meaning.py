"""Scores of what a feature's contexts have in common: coherence, detection and fuzzing.

All read `FeatureContexts`, so that experts, transcoder latents and neurons are scored alike, on the same text. Each has
a random control and a 95 % interval over features.

    coherence   Mean cosine of sentence embeddings of the contexts in which a feature is most active, minus that of
                random contexts.
    detection   Balanced accuracy of a judge that tells, from an explanation alone, contexts in which a feature is
                active from random ones in which it is not.
    fuzzing     The same of contexts whose marked tokens are those on which the feature is active, against contexts in
                which random tokens are marked.

Detection and fuzzing are the protocols of Delphi (Paulo et al., "Automatically Interpreting Millions of Features in
Large Language Models", arXiv 2410.13928). Their control is the same judge with the explanation of another feature.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .feature_contexts import MARKS, Context, FeatureContexts

Embed = Callable[[list[str]], Any]
"""A function from texts to their embeddings, (texts, dimensions), such as `SentenceTransformer.encode`."""
Explain = Callable[[list[str]], str]
"""A function from examples, whose active tokens are between << and >>, to an explanation."""
Judge = Callable[[str, list[str]], Sequence[bool]]
"""A function from an explanation and texts to an answer for each: is the feature active there, or marked right?"""
_RESAMPLES = 2000


def mean_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return `mean` of values and its 95 % `interval`, by bootstrap: percentiles of the means of 2,000 resamples."""
    found = np.asarray(values, dtype=np.float64)
    means = np.random.default_rng(seed).choice(found, (_RESAMPLES, len(found))).mean(1)
    return {"mean": float(found.mean()), "interval": np.quantile(means, [0.025, 0.975]).tolist()}


def coherence_score(
    contexts: FeatureContexts, tokenizer: PreTrainedTokenizerBase, embed: Embed, *, examples: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Compare the contexts in which a feature is most active with each other:

        coherence = mean_{i ≠ j} cos(e_i, e_j) of its contexts − the same of random contexts

    Args:
        contexts: from `collect_contexts`.
        tokenizer: of the model.
        embed: see `Embed`.
        examples: contexts of a feature, and of its control.
        seed: seed of the random contexts.

    Returns:
        `features`: for each feature its index, `cosine`, `control` and `same_token`, the share of its contexts whose
        own token is the most common one. `cosine`, `control`, `same_token` and `coherence`: mean and interval.

    Raises:
        ValueError: a feature has fewer than `examples` contexts.
    """
    rng, found = np.random.default_rng(seed), []
    for index, feature in enumerate(contexts.features):
        top = _enough(contexts, index, contexts.top(index, examples), examples)
        pools = top, contexts.random_contexts(examples, rng)
        cosine, control = (_mean_cosine(embed([contexts.text(tokenizer, one) for one in pool])) for pool in pools)
        tokens = Counter(contexts.rows[context.row][context.position] for context in top)
        same = tokens.most_common(1)[0][1] / len(top)
        found.append({"feature": feature, "cosine": cosine, "control": control, "same_token": same})
    names = ("cosine", "control", "same_token")
    columns = {name: np.array([one[name] for one in found]) for name in names}
    columns["coherence"] = columns["cosine"] - columns["control"]
    return {"features": found, **{name: mean_interval(column, seed) for name, column in columns.items()}}


def detection_score(
    contexts: FeatureContexts, tokenizer: PreTrainedTokenizerBase, explain: Explain, judge: Judge, **options: Any
) -> dict[str, Any]:
    """Measure whether an explanation tells contexts in which a feature is active from random ones.

    Args:
        contexts: from `collect_contexts`.
        tokenizer: of the model.
        explain, judge: see `Explain` and `Judge`: a language model, or `keyword_explainer` and `keyword_judge`.
        **options: `explained` (10): contexts that the explainer reads, the strongest. `tested` (10): contexts that the
            judge reads, evenly spaced over the values of the others; as many random ones. `seed` (0).

    Returns:
        `features`: for each feature its index, `explanation`, `balanced_accuracy`, and `control`, with the explanation
        of the next feature (its own, if there is one). `balanced_accuracy` and `control`: mean and interval; 0.5 is
        chance.

    Raises:
        ValueError: a feature has fewer than `explained` + `tested` contexts, or the judge gives not one answer a text.
    """
    return _judged(contexts, tokenizer, explain, judge, marks=False, **options)


def fuzzing_score(
    contexts: FeatureContexts, tokenizer: PreTrainedTokenizerBase, explain: Explain, judge: Judge, **options: Any
) -> dict[str, Any]:
    """Measure whether an explanation tells the tokens on which a feature is active from random tokens.

    The judge reads contexts with marks: around the tokens on which the feature has at least 0.3 of its largest value
    there, or around as many random tokens of a context in which it is not active. For the rest see `detection_score`.
    """
    return _judged(contexts, tokenizer, explain, judge, marks=True, **options)


def _judged(
    contexts: FeatureContexts,
    tokenizer: PreTrainedTokenizerBase,
    explain: Explain,
    judge: Judge,
    *,
    marks: bool,
    explained: int = 10,
    tested: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    explanations, texts = [], []
    for index in range(len(contexts.features)):
        top = _enough(contexts, index, contexts.top(index, explained), explained)
        active = _enough(contexts, index, contexts.spread(index, tested, apart=top), tested)
        explanations.append(explain([contexts.text(tokenizer, one, contexts.marked(index, one)) for one in top]))
        texts.append(_test_texts(contexts, tokenizer, index, active, marks, rng))
    found: list[dict[str, Any]] = []
    for index, feature in enumerate(contexts.features):
        other = explanations[(index + 1) % len(explanations)]
        accuracy, control = (_accuracy(judge, one, *texts[index], rng) for one in (explanations[index], other))
        row = {"feature": feature, "explanation": explanations[index]}
        found.append({**row, "balanced_accuracy": accuracy, "control": control})
    names = ("balanced_accuracy", "control")
    return {"features": found, **{name: mean_interval([one[name] for one in found], seed) for name in names}}


def _test_texts(
    contexts: FeatureContexts,
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    active: list[Context],
    marks: bool,
    rng: np.random.Generator,
) -> tuple[list[str], list[str]]:
    """Return the texts of contexts in which a feature is active, and of as many random ones in which it is not."""
    quiet = contexts.random_contexts(len(active), rng, without=index)
    if len(quiet) < len(active):
        raise ValueError(
            f"feature {contexts.features[index]} is active almost everywhere: only {len(quiet)} random contexts are "
            f"without it, and {len(active)} are needed; leave it out, or give more text"
        )
    if not marks:
        return [contexts.text(tokenizer, one) for one in active], [contexts.text(tokenizer, one) for one in quiet]
    marked = [contexts.marked(index, one) for one in active]
    count = -(-sum(map(len, marked)) // len(marked))  # the mean number, rounded up
    wrong = []
    for one in quiet:
        begin, end = contexts.window(one)
        wrong.append(set((begin + rng.permutation(end - begin)[:count]).tolist()))
    return (
        [contexts.text(tokenizer, *pair) for pair in zip(active, marked, strict=True)],
        [contexts.text(tokenizer, *pair) for pair in zip(quiet, wrong, strict=True)],
    )


def _accuracy(judge: Judge, explanation: str, yes: list[str], no: list[str], rng: np.random.Generator) -> float:
    """Return the balanced accuracy of a judge, who reads the texts in random order."""
    texts, actual = yes + no, np.arange(len(yes) + len(no)) < len(yes)
    order = rng.permutation(len(texts))
    answers = np.asarray(judge(explanation, [texts[place] for place in order]), dtype=bool)
    if answers.shape != (len(texts),):
        raise ValueError(f"the judge must give one answer for each of the {len(texts)} texts, got {answers.shape}")
    right = answers == actual[order]
    return float(right[actual[order]].mean() + right[~actual[order]].mean()) / 2


def _enough(contexts: FeatureContexts, index: int, found: list[Context], count: int) -> list[Context]:
    if len(found) < count:
        raise ValueError(
            f"feature {contexts.features[index]} has {len(found)} more distinct contexts, and {count} are needed: "
            "leave it out (FeatureContexts.live), or give more text"
        )
    return found


def _mean_cosine(embeddings: Any) -> float:
    """Return the mean cosine of all pairs of distinct rows of embeddings (texts, dimensions)."""
    unit = np.asarray(embeddings, dtype=np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return float((unit @ unit.T)[~np.eye(len(unit), dtype=bool)].mean())


def keyword_explainer(background: Iterable[str], words: int = 5) -> Explain:
    """Make an explainer that needs no model: the words that are in more of the examples than of the background.

    A word counts for the share of examples that contain it, once more for the share in which it is marked, minus twice
    the share of background texts that contain it.
    """
    common, total = Counter[str](), 0
    for text in background:
        common.update(_words(text))
        total += 1

    def explain(examples: list[str]) -> str:
        counts = Counter(word for text in examples for word in (*_words(text), *_words(text, marked=True)))
        gain = {word: count / len(examples) - 2 * common[word] / max(total, 1) for word, count in counts.items()}
        best = sorted(gain, key=lambda word: (-gain[word], word))[:words]
        return ", ".join(word for word in best if gain[word] > 0)

    return explain


def keyword_judge(explanation: str, texts: list[str]) -> list[bool]:
    """Say yes to texts that have a word of the explanation: among the marked ones if there are any, else anywhere."""
    named = _words(explanation)
    return [bool(named & _words(text, marked=MARKS[0] in text)) for text in texts]


def _words(text: str, marked: bool = False) -> set[str]:
    """Return the words of a text in lower case; with `marked`, those of which at least a part is between marks."""
    begin, end = map(re.escape, MARKS)
    if marked:
        text = " ".join(re.findall(rf"\w*{begin}.*?{end}\w*", text, flags=re.DOTALL))
    return set(re.findall(r"\w+", re.sub(f"{begin}|{end}", "", text).lower()))

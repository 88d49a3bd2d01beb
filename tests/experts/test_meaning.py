import numpy as np
import pytest
from factories import word_tokenizer

from mxd.experts import (
    FeatureContexts,
    coherence_score,
    detection_score,
    fuzzing_score,
    keyword_explainer,
    keyword_judge,
)
from mxd.experts.meaning import mean_interval

TOKENIZER = word_tokenizer(600)
WORDS = {40: 5, 41: 6, 42: 7}  # token that each feature is active on, and the feature


def planted(rows=150, tokens=12, words=tuple(WORDS), silent=()):
    """Features that are active on one word each, in random text where one of these words, or none, is in a row."""
    rng = np.random.default_rng(0)
    texts = [[0, *rng.integers(50, 600, tokens).tolist()] for _ in range(rows)]
    for row, ids in enumerate(texts):
        if row % (len(words) + 1) < len(words):
            ids[int(rng.integers(1, tokens + 1))] = words[row % (len(words) + 1)]
    places = []
    for word in words:
        found = [(row, ids.index(word)) for row, ids in enumerate(texts) if word in ids and word not in silent]
        row, position = np.array(found, dtype=int).reshape(-1, 2).T
        places.append((row, position, rng.random(len(row)) + 0.5))
    return FeatureContexts([WORDS[word] for word in words], texts, list(range(rows)), places)


def embed(texts):
    """Count the words of WORDS: texts that share one are alike; a constant keeps the others from being all zero."""
    return [[2.0 * (f"word{word}" in text.split()) for word in WORDS] + [1.0] for text in texts]


def test_coherence_by_hand():
    found = coherence_score(planted(), TOKENIZER, embed, examples=4)
    assert [one["feature"] for one in found["features"]] == [5, 6, 7]
    for one in found["features"]:
        assert one["cosine"] == pytest.approx(1) and one["same_token"] == 1
        assert 0 < one["control"] < 1
    assert found["coherence"]["mean"] == pytest.approx(1 - found["control"]["mean"])
    low, high = found["coherence"]["interval"]
    assert low < found["coherence"]["mean"] < high


def test_cosines_of_pairs():
    vectors = {"word60": [1.0, 0.0], "word61": [0.0, 2.0], "word62": [3.0, 3.0]}
    contexts = FeatureContexts(
        [0], [[0, 60], [0, 61], [0, 62]], [0, 1, 2], [(np.arange(3), np.ones(3, int), np.ones(3))]
    )
    found = coherence_score(contexts, TOKENIZER, lambda texts: [vectors[text] for text in texts], examples=3)
    assert found["cosine"]["mean"] == pytest.approx((0 + 0.5**0.5 + 0.5**0.5) / 3)
    assert found["same_token"]["mean"] == pytest.approx(1 / 3)
    assert found["coherence"]["mean"] == pytest.approx(0)  # the control has the same three


@pytest.mark.parametrize("score", [detection_score, fuzzing_score])
def test_a_right_explanation_is_told_from_a_wrong_one(score):
    contexts = planted()
    explain = keyword_explainer((TOKENIZER.decode(ids) for ids in contexts.rows), words=1)
    found = score(contexts, TOKENIZER, explain, keyword_judge)
    assert [one["explanation"] for one in found["features"]] == ["word40", "word41", "word42"]
    assert found["balanced_accuracy"]["mean"] == 1
    assert 0.3 < found["control"]["mean"] <= 0.55  # another feature's word is not in these contexts
    assert score(contexts, TOKENIZER, explain, keyword_judge) == found


@pytest.mark.parametrize("score", [detection_score, fuzzing_score])
@pytest.mark.parametrize(("answer", "accuracy"), [(True, 0.5), (False, 0.5)])
def test_a_judge_that_always_says_the_same_is_at_chance(score, answer, accuracy):
    found = score(planted(), TOKENIZER, lambda examples: "", lambda explanation, texts: [answer] * len(texts))
    assert found["balanced_accuracy"] == {"mean": accuracy, "interval": [accuracy, accuracy]}


def test_what_explainer_and_judge_read():
    read = {"examples": [], "texts": []}

    def explain(examples):
        read["examples"] += examples
        return "an explanation"

    def judge(explanation, texts):
        assert explanation == "an explanation"
        read["texts"] += texts
        return np.array([1] * len(texts))

    options = {"explained": 3, "tested": 5}
    detection_score(planted(words=(40,)), TOKENIZER, explain, judge, **options)
    assert len(read["examples"]) == 3 and all(
        "<< word40>>" in text or "<<word40>>" in text for text in read["examples"]
    )
    detected, read["texts"] = read["texts"], []
    assert len(detected) == 2 * 10 and not any("<<" in text for text in detected)  # its own, and the control's
    assert sum("word40" in text.split() for text in detected) == 2 * 5
    fuzzing_score(planted(words=(40,)), TOKENIZER, explain, judge, **options)
    assert all(text.count("<<") == 1 for text in read["texts"])
    assert sum("word40>>" in text for text in read["texts"]) == 2 * 5
    explained = {text.replace("<<", "").replace(">>", "") for text in read["examples"]}
    assert not explained & {text.replace("<<", "").replace(">>", "") for text in read["texts"]}


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match=r"feature 6 has 0 more distinct contexts, and 4 are needed.*live"):
        coherence_score(planted(silent=(41,)), TOKENIZER, embed, examples=4)
    with pytest.raises(ValueError, match="one answer for each of the 20 texts"):
        detection_score(planted(), TOKENIZER, lambda examples: "", lambda explanation, texts: [True])
    everywhere = planted(words=(40,))
    row = np.arange(len(everywhere.rows))
    everywhere.places[0] = (row, np.full(len(row), 6), np.ones(len(row)))
    with pytest.raises(ValueError, match="feature 5 is active almost everywhere: only 0 random contexts"):
        detection_score(everywhere, TOKENIZER, lambda examples: "", keyword_judge)


def test_intervals_are_of_resampled_means():
    assert mean_interval([0.25] * 5) == {"mean": 0.25, "interval": [0.25, 0.25]}
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = mean_interval(values)["interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)

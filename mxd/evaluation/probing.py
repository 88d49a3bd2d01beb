"""Sparse probing: classify texts by a single feature, or by a few.

Every class is separated from all others. A fold never splits a document, so that a probe cannot use on test texts what
it learned of a document in training.

    single    Fit a class-balanced logistic regression on each of the `candidates` features with the largest difference
              of class means on the training texts, and choose the best by training F1; report its test F1. Oldfield et
              al. (arXiv 2505.21364) report the best test F1, an optimistic figure: here `best_test_f1`.
    k-sparse  Fit one logistic regression on the k features with the largest absolute difference of class means, on
              texts drawn half from the class and half evenly from the others; report the test accuracy, for which
              chance is 0.5 (SAEBench, Karvonen et al., arXiv 2503.09532).

Hyper-parameters are those of the authors' code: scikit-learn's L2 penalty with C = 1; newton-cholesky and 200
iterations for single features, lbfgs and 1,000 for several. The penalty weighs more on features of a small scale,
unless `standardize` divides each by its standard deviation.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .pooling import Features

CANDIDATES = 100
SPARSITIES = (1, 2, 5)
FOLDS = 5

Fold = tuple[np.ndarray, np.ndarray]
"""Indices of the training texts, and of the test texts."""


def check_scikit_learn() -> None:
    """Raise `ImportError` with the pip command if scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("probing needs scikit-learn: pip install scikit-learn scipy") from error


def f1_score(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Return 2 TP / (2 TP + FP + FN) of boolean arrays (texts); 0 if nothing is positive."""
    hits = int((predicted & actual).sum())
    positives = int(predicted.sum()) + int(actual.sum())
    return 2 * hits / positives if positives else 0.0


def always_yes_f1(labels: np.ndarray) -> dict[str, float]:
    """Return {class: 2p / (1 + p)}, p its share of the texts: the F1 of a probe that always says yes."""
    names, counts = np.unique(labels, return_counts=True)
    return {str(name): float(2 * count / (len(labels) + count)) for name, count in zip(names, counts, strict=True)}


def balanced_accuracy(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Return the mean of recall and specificity of boolean arrays (texts)."""
    return (float(predicted[actual].mean()) + float((~predicted[~actual]).mean())) / 2


def grouped_folds(labels: np.ndarray, groups: np.ndarray, folds: int = FOLDS, seed: int = 0) -> list[Fold]:
    """Split texts into folds, stratified by class, with every group in one fold; return each fold as the test side.

    Args:
        labels, groups: class and group of each text, (T).
        folds: number of folds; 5 give the authors' 80 : 20.
        seed: seed of the split.

    Raises:
        ValueError: see `check_groups`; or the groups are so uneven that a fold lacks a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    check_groups(labels, groups, folds)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    found = list(splitter.split(np.zeros(len(labels)), labels, groups))
    for side in (side for fold in found for side in fold):
        if missing := set(labels) - set(labels[side]):
            raise ValueError(
                f"the documents are too uneven for {folds} folds: one is left without class {min(missing)}; use "
                "fewer folds, more documents, or another seed"
            )
    return found


def check_groups(labels: np.ndarray, groups: np.ndarray, folds: int = FOLDS) -> None:
    """Check quickly that `grouped_folds`, which takes minutes for a million documents, can succeed.

    Raises:
        ValueError: there are fewer than two classes or folds, or a class has fewer groups than there are folds.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(f"probing needs two classes, and there is only {', '.join(map(str, classes)) or 'none'}")
    if folds < 2:
        raise ValueError(f"folds must be at least 2, one to train on and one to test on; got {folds}")
    counts = {str(name): len(np.unique(groups[labels == name])) for name in classes}
    few = [f"{name} ({count})" for name, count in counts.items() if count < folds]
    if few:
        raise ValueError(
            f"{len(few)} classes have texts of fewer documents than the {folds} folds: {', '.join(few[:8])}; leave "
            "them out (classes), give more documents, or use fewer folds"
        )


def probe_features(
    features: Features,
    labels: np.ndarray,
    folds: Sequence[Fold],
    *,
    candidates: int = CANDIDATES,
    sparsities: Sequence[int] = SPARSITIES,
    standardize: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Probe one representation for every class against all others; see the module's docstring.

    Candidates of a sparse representation (non-negative coefficients) have the largest mean on the class minus mean off
    it, as in the authors' code; those of a dense one, whose features have both signs, the largest absolute difference.

    Args:
        features: (T, width), from `pool_features`.
        labels: (T).
        folds: from `grouped_folds`.
        candidates: number of features that are tried alone.
        sparsities: values of k for the k-sparse probes.
        standardize: first divide every feature by its standard deviation on the training texts.
        seed: seed of the texts drawn for the k-sparse probes, which are the same for every representation.

    Returns:
        `width`: number of features. `classes`: for each class `f1`, `best_test_f1`, `balanced_accuracy` (of the same
        probe as `f1`) and `k_sparse` {k: accuracy}, means over folds; `f1_folds`, the F1 of each fold, and `features`,
        the feature chosen in each. `f1`, `best_test_f1`, `balanced_accuracy`, `k_sparse`, `f1_folds`: means over
        classes. `f1_error`: standard error of the mean of `f1_folds`, treating folds as independent.
    """
    import sklearn

    table, classes = _Table(features), np.unique(labels)
    members = labels == classes[:, None]
    per_class: dict[str, list[dict[str, Any]]] = {str(name): [] for name in classes}
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        for number, fold in enumerate(folds):
            scale = table.deviations(fold[0]) if standardize else np.ones(table.width)
            differences = table.differences(fold[0], members) / scale
            for index, (name, actual) in enumerate(zip(classes, members, strict=True)):
                chosen = largest(differences[index] if table.sparse else np.abs(differences[index]), candidates)
                found = probe_single(table.columns(chosen) / scale[chosen], actual, fold)
                found["feature"] = int(chosen[found["feature"]])
                balanced = balanced_fold(labels, name, fold, np.random.default_rng([seed, number, index]))
                found["k_sparse"] = _probe_few(table, scale, actual, balanced, sparsities)
                per_class[str(name)].append(found)
    return {"width": table.width, **_summary(per_class)}


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest values, in descending order, the first of equal ones first."""
    return np.argsort(-values, kind="stable")[:count]


def probe_single(columns: np.ndarray, actual: np.ndarray, fold: Fold) -> dict[str, Any]:
    """Fit a class-balanced logistic regression on every feature alone; skip those constant on the training texts.

    Args:
        columns: the candidates, (T, candidates).
        actual: whether a text is of the class, (T) bool.

    Returns:
        `feature`, the candidate with the best F1 on the training texts (the first of equals); its `f1` and
        `balanced_accuracy` on the test texts; `best_test_f1`, the best test F1 of any candidate.
    """
    from sklearn.linear_model import LogisticRegression

    train, test = fold
    model = LogisticRegression(class_weight="balanced", solver="newton-cholesky", max_iter=200)
    best: dict[str, Any] = {"feature": 0, "f1": 0.0, "balanced_accuracy": 0.5}
    best_train, best_test = -1.0, 0.0
    for index in np.flatnonzero(np.ptp(columns[train], axis=0)).tolist():
        model.fit(columns[train, index : index + 1], actual[train])
        predicted = columns[:, index] * model.coef_[0, 0] + model.intercept_[0] > 0
        on_train, on_test = (f1_score(predicted[side], actual[side]) for side in (train, test))
        best_test = max(best_test, on_test)
        if on_train > best_train:
            best_train, accuracy = on_train, balanced_accuracy(predicted[test], actual[test])
            best = {"feature": index, "f1": on_test, "balanced_accuracy": accuracy}
    return {**best, "best_test_f1": best_test}


def balanced_fold(labels: np.ndarray, name: Any, fold: Fold, rng: np.random.Generator) -> Fold:
    """Balance both sides as SAEBench does: half of the class, half evenly of the others."""

    def balanced(side: np.ndarray) -> np.ndarray:
        positives = rng.permutation(side[labels[side] == name])
        others = [rng.permutation(side[labels[side] == other]) for other in np.unique(labels[side]) if other != name]
        each = math.ceil(len(positives) / len(others))
        negatives = rng.permutation(np.concatenate([members[:each] for members in others]))
        count = min(len(positives), len(negatives))
        return np.concatenate([positives[:count], negatives[:count]])

    return balanced(fold[0]), balanced(fold[1])


def _probe_few(
    table: "_Table", scale: np.ndarray, actual: np.ndarray, fold: Fold, sparsities: Sequence[int]
) -> dict[str, float]:
    """Return {k: accuracy on the test texts}, with k as a string, as in JSON."""
    from sklearn.linear_model import LogisticRegression

    train, test = fold
    difference = table.differences(train, actual[None])[0]
    chosen = largest(np.abs(difference) / scale, max(sparsities))
    columns = table.columns(chosen) / scale[chosen]
    accuracies = {}
    for k in sparsities:
        model = LogisticRegression(max_iter=1000).fit(columns[train, :k], actual[train])
        accuracies[str(k)] = float((model.predict(columns[test, :k]) == actual[test]).mean())
    return accuracies


class _Table:
    """Features (T, width), dense or sparse, with access to columns as float64, and to class means."""

    def __init__(self, features: Features):
        self.width = int(features.shape[1])
        self.sparse = not isinstance(features, np.ndarray)
        self.rows = features
        self._columns: Any = features if isinstance(features, np.ndarray) else features.tocsc()

    def columns(self, chosen: np.ndarray) -> np.ndarray:
        """Return (T, chosen) float64."""
        found = self._columns[:, chosen]
        return np.asarray(found.toarray() if self.sparse else found, dtype=np.float64)

    def differences(self, texts: np.ndarray, members: np.ndarray) -> np.ndarray:
        """Return the mean over the members (C, T) of each class minus that over the rest of `texts`, (C, width)."""
        inside, every = np.zeros(members.shape), np.zeros((1, members.shape[1]))
        inside[:, texts], every[:, texts] = members[:, texts], 1
        counts, total = inside.sum(1, keepdims=True), every @ self.rows
        sums = np.asarray(inside @ self.rows, dtype=np.float64)
        return sums / counts - (total - sums) / (len(texts) - counts)

    def deviations(self, texts: np.ndarray) -> np.ndarray:
        """Return the standard deviation over `texts`, (width); 1 if a feature does not vary."""
        rows: Any = self.rows[texts]
        rows = rows.astype(np.float64)
        squares = rows.multiply(rows) if self.sparse else rows * rows
        mean, square = (np.asarray(part.mean(axis=0)).ravel() for part in (rows, squares))
        variance = np.maximum(square - mean**2, 0)
        return np.sqrt(np.where(variance > 1e-12 * square, variance, 1.0))


def _summary(per_class: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Average over folds for each class, and over classes."""
    classes = {
        label: {
            **_means(found),
            "f1_folds": [fold["f1"] for fold in found],
            "features": [fold["feature"] for fold in found],
        }
        for label, found in per_class.items()
    }
    f1_folds = np.mean([found["f1_folds"] for found in classes.values()], axis=0)
    return {
        **_means(list(classes.values())),
        "f1_folds": f1_folds.tolist(),
        "f1_error": float(f1_folds.std(ddof=1)) / math.sqrt(len(f1_folds)),
        "classes": classes,
    }


def _means(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("f1", "best_test_f1", "balanced_accuracy")
    return {
        **{name: float(np.mean([each[name] for each in found])) for name in names},
        "k_sparse": {k: float(np.mean([each["k_sparse"][k] for each in found])) for k in found[0]["k_sparse"]},
    }

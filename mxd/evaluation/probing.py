"""Sparse probing: can single features, or a few, tell classes of texts apart?

Every class is told from all others, on folds of the texts that keep those of one document together: what a probe
knows of a document from its training it cannot use on the test.

    single    of the `candidates` features with the largest difference of class means on the training texts, each alone
              in a class-balanced logistic regression, the one with the best F1 there; reported is its F1 on the test
              texts. Oldfield et al. (arXiv 2505.21364) publish the best F1 on the test texts themselves, which is an
              optimistic figure: here `best_test_f1`.
    k-sparse  one logistic regression on the k features with the largest absolute difference of class means; texts are
              drawn so that half are of the class and the rest in equal parts of the others, and the figure is accuracy
              on the test texts, of which 0.5 is chance (SAEBench, Karvonen et al., arXiv 2503.09532).

Hyper-parameters are those of the authors' code: scikit-learn's L2 penalty with C = 1; newton-cholesky and 200
iterations for single features, lbfgs and 1,000 for several. Features go in as they are, so that the penalty weighs more
on those of a small scale; `standardize` divides each by its standard deviation first, which makes representations of
different scales comparable.
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
"""Indices of the training texts and of the test texts."""


def check_scikit_learn() -> None:
    """Raise an ImportError that says what to install, where scikit-learn is not."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("probing needs scikit-learn: pip install scikit-learn scipy") from error


def f1_score(predicted: np.ndarray, actual: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of boolean arrays (texts); 0 where nothing is positive."""
    hits = int((predicted & actual).sum())
    positives = int(predicted.sum()) + int(actual.sum())
    return 2 * hits / positives if positives else 0.0


def always_yes_f1(labels: np.ndarray) -> dict[str, float]:
    """{class: 2p / (1 + p)} with p its share of the texts: the F1 of saying yes to every text, which knows nothing."""
    names, counts = np.unique(labels, return_counts=True)
    return {str(name): float(2 * count / (len(labels) + count)) for name, count in zip(names, counts, strict=True)}


def balanced_accuracy(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Mean of the shares of positives and of negatives that are told right, of boolean arrays (texts)."""
    return (float(predicted[actual].mean()) + float((~predicted[~actual]).mean())) / 2


def grouped_folds(labels: np.ndarray, groups: np.ndarray, folds: int = FOLDS, seed: int = 0) -> list[Fold]:
    """Divide texts into folds with about the same shares of classes in each, no group in more than one; each fold in
    turn is the test side, the others the training side.

    Args:
        labels, groups: of each text, (T).
        folds: how many; 5 give the authors' 80 : 20.
        seed: another seed, other folds.

    Raises:
        ValueError: there are fewer than two classes; a class has fewer groups than there are folds, or the groups are
            so uneven that a fold is left without it.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    check_groups(labels, groups, folds)
    classes = np.unique(labels)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    found = list(splitter.split(np.zeros(len(labels)), labels, groups))
    for train, test in found:
        missing = set(classes) - set(labels[test]) | set(classes) - set(labels[train])
        if missing:
            raise ValueError(
                f"the documents are too uneven for {folds} folds: one is left without class {min(missing)}; take "
                "fewer folds, more documents, or another seed"
            )
    return found


def check_groups(labels: np.ndarray, groups: np.ndarray, folds: int = FOLDS) -> None:
    """Refuse what no division by groups can be had of, which is known without one: of a million documents it takes
    minutes.

    Raises:
        ValueError: there are fewer than two classes or folds, or a class has fewer groups than there are folds.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError(f"probing tells classes apart, and there is only {', '.join(map(str, classes)) or 'none'}")
    if folds < 2:
        raise ValueError(f"folds must be at least 2, one to train on and one to test on; got {folds}")
    counts = {str(name): len(np.unique(groups[labels == name])) for name in classes}
    few = {name: count for name, count in counts.items() if count < folds}
    if few:
        named = ", ".join(f"{name} ({count})" for name, count in list(few.items())[:8])
        raise ValueError(
            f"{len(few)} classes have texts of fewer documents than the {folds} folds, among which a document cannot "
            f"be divided: {named}; leave them out (classes), give more documents, or take fewer folds"
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
    """Probe one representation for every class against all others. The module's text says how.

    Of a sparse representation (non-negative coefficients) the candidates are those with the largest mean on the class
    minus mean off it, as in the authors' code; of a dense one, whose features have both signs, the difference counts
    without its sign.

    Args:
        features: (T, width), as `pool_features` gives them.
        labels: (T).
        folds: of `grouped_folds`.
        candidates: features that are tried alone.
        sparsities: the k of the k-sparse probes.
        standardize: divide every feature by its standard deviation on the training texts before all else.
        seed: of the texts that are drawn for the k-sparse probes; with the same seed they are the same for every
            representation.

    Returns:
        `width`: number of features. `classes`: for each class `f1`, `best_test_f1`, `balanced_accuracy` (of the same
        probe as `f1`) and `k_sparse` {k: accuracy}, means over folds; `f1_folds`, the F1 of each fold, and `features`,
        the feature chosen in each. `f1`, `best_test_f1`, `balanced_accuracy`, `k_sparse`, `f1_folds`: means over
        classes. `f1_error`: standard error of the mean of `f1_folds`, the folds taken for independent.
    """
    import sklearn

    table = _Table(features, labels)
    per_class: dict[str, list[dict[str, Any]]] = {str(name): [] for name in table.classes}
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        for number, fold in enumerate(folds):
            scale = table.deviations(fold[0]) if standardize else np.ones(table.width)
            differences = table.differences(fold[0]) / scale
            for index, name in enumerate(table.classes):
                actual = labels == name
                chosen = largest(differences[index] if table.sparse else np.abs(differences[index]), candidates)
                found = probe_single(table.columns(chosen) / scale[chosen], actual, fold)
                found["feature"] = int(chosen[found["feature"]])
                rng = np.random.default_rng([seed, number, index])
                balanced = balanced_fold(labels, name, fold, rng)
                found["k_sparse"] = _probe_few(table, scale, actual, balanced, sparsities)
                per_class[str(name)].append(found)
    return {"width": table.width, **_summary(per_class, sparsities)}


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, in falling order; of equal ones the first."""
    return np.argsort(-values, kind="stable")[:count]


def probe_single(columns: np.ndarray, actual: np.ndarray, fold: Fold) -> dict[str, Any]:
    """Every feature alone in a class-balanced logistic regression.

    Args:
        columns: the candidates, (T, candidates).
        actual: whether a text is of the class, (T) bool.
        fold: training and test texts.

    Returns:
        `feature`, the candidate with the best F1 on the training texts (the first of equals); its `f1` and
        `balanced_accuracy` on the test texts; `best_test_f1`, the best that any has there. Features that are the same
        on all training texts tell nothing and are passed over.
    """
    from sklearn.linear_model import LogisticRegression

    train, test = fold
    model = LogisticRegression(class_weight="balanced", solver="newton-cholesky", max_iter=200)
    best: dict[str, Any] = {"feature": 0, "f1": 0.0, "balanced_accuracy": 0.5}
    best_train, best_test = -1.0, 0.0
    for index in np.flatnonzero(np.ptp(columns[train], axis=0)):
        model.fit(columns[train, index : index + 1], actual[train])
        predicted = columns[:, index] * model.coef_[0, 0] + model.intercept_[0] > 0
        on_train, on_test = (f1_score(predicted[side], actual[side]) for side in (train, test))
        best_test = max(best_test, on_test)
        if on_train > best_train:
            best_train = on_train
            accuracy = balanced_accuracy(predicted[test], actual[test])
            best = {"feature": int(index), "f1": on_test, "balanced_accuracy": accuracy}
    return {**best, "best_test_f1": best_test}


def balanced_fold(labels: np.ndarray, name: Any, fold: Fold, rng: np.random.Generator) -> Fold:
    """SAEBench's balance: as many texts of the class as of all others, and of these as many of each, on both sides."""
    train, test = (_balanced(labels, name, side, rng) for side in fold)
    return train, test


def _balanced(labels: np.ndarray, name: Any, side: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    positives = rng.permutation(side[labels[side] == name])
    others = [rng.permutation(side[labels[side] == other]) for other in np.unique(labels[side]) if other != name]
    each = math.ceil(len(positives) / len(others))
    negatives = rng.permutation(np.concatenate([members[:each] for members in others]))
    count = min(len(positives), len(negatives))
    return np.concatenate([positives[:count], negatives[:count]])


def _probe_few(
    table: "_Table", scale: np.ndarray, actual: np.ndarray, fold: Fold, sparsities: Sequence[int]
) -> dict[str, float]:
    """{k: accuracy on the test texts}; k in words, as in JSON."""
    from sklearn.linear_model import LogisticRegression

    train, test = fold
    difference = np.abs(table.difference(train[actual[train]], train[~actual[train]])) / scale
    chosen = largest(difference, max(sparsities))
    columns = table.columns(chosen) / scale[chosen]
    accuracies = {}
    for k in sparsities:
        model = LogisticRegression(max_iter=1000).fit(columns[train, :k], actual[train])
        accuracies[str(k)] = float((model.predict(columns[test, :k]) == actual[test]).mean())
    return accuracies


class _Table:
    """Features as probes need them: columns as float64, and means of classes.

    Attributes:
        classes: names, (C).
        width: number of features.
        sparse: whether the features are coefficients of which few are not zero.
    """

    def __init__(self, features: Features, labels: np.ndarray):
        self.classes = np.unique(labels)
        self.labels = labels
        self.width = int(features.shape[1])
        self.sparse = not isinstance(features, np.ndarray)
        self.rows = features
        self._columns: Any = features if isinstance(features, np.ndarray) else features.tocsc()

    def columns(self, chosen: np.ndarray) -> np.ndarray:
        """(T, chosen) float64."""
        found = self._columns[:, chosen]
        return np.asarray(found.toarray() if self.sparse else found, dtype=np.float64)

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """weights (n, T) times the features: (n, width) float64."""
        return np.asarray(weights @ self.rows, dtype=np.float64)

    def differences(self, texts: np.ndarray) -> np.ndarray:
        """Mean of each class minus mean of all others over `texts`, (C, width)."""
        members = np.zeros((len(self.classes), len(self.labels)))
        members[:, texts] = self.labels[texts] == self.classes[:, None]
        counts, sums = members.sum(1, keepdims=True), self.sums(members)
        return sums / counts - (sums.sum(0) - sums) / (counts.sum() - counts)

    def difference(self, positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
        """Mean over some texts minus mean over others, (width)."""
        weights = np.zeros((1, len(self.labels)))
        weights[0, positives], weights[0, negatives] = 1 / len(positives), -1 / len(negatives)
        return self.sums(weights)[0]

    def deviations(self, texts: np.ndarray) -> np.ndarray:
        """Standard deviation over `texts`, (width); 1 where a feature does not vary."""
        rows: Any = self.rows[texts]
        rows = rows.astype(np.float64)
        squares = rows.multiply(rows) if self.sparse else rows * rows
        mean, square = (np.asarray(part.mean(axis=0)).ravel() for part in (rows, squares))
        variance = np.maximum(square - mean**2, 0)
        return np.sqrt(np.where(variance > 1e-12 * square, variance, 1.0))


def _summary(per_class: dict[str, list[dict[str, Any]]], sparsities: Sequence[int]) -> dict[str, Any]:
    """Means over folds for each class, and over classes."""
    classes = {
        label: {
            **_means(found, sparsities),
            "f1_folds": [fold["f1"] for fold in found],
            "features": [fold["feature"] for fold in found],
        }
        for label, found in per_class.items()
    }
    f1_folds = np.mean([found["f1_folds"] for found in classes.values()], axis=0)
    return {
        **_means(list(classes.values()), sparsities),
        "f1_folds": f1_folds.tolist(),
        "f1_error": float(f1_folds.std(ddof=1)) / math.sqrt(len(f1_folds)),
        "classes": classes,
    }


def _means(found: Sequence[dict[str, Any]], sparsities: Sequence[int]) -> dict[str, Any]:
    names = ("f1", "best_test_f1", "balanced_accuracy")
    return {
        **{name: float(np.mean([each[name] for each in found])) for name in names},
        "k_sparse": {str(k): float(np.mean([each["k_sparse"][str(k)] for each in found])) for k in sparsities},
    }

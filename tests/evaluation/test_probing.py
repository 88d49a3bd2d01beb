import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.sparse import csr_array

from mxd.evaluation import always_yes_f1, grouped_folds, plot_probing, probe_features
from mxd.evaluation.probing import balanced_accuracy, balanced_fold, f1_score, largest


def problem(classes=3, documents=10, texts=4, seed=0):
    """Labels and groups of texts, `texts` of each of `documents` of each class, in no order."""
    labels = np.repeat([f"class {index}" for index in range(classes)], documents * texts)
    groups = np.repeat([f"document {index}" for index in range(classes * documents)], texts)
    order = np.random.default_rng(seed).permutation(len(labels))
    return labels[order], groups[order]


def sparse_features(texts, width, rng, share=0.2):
    return csr_array(np.where(rng.random((texts, width)) < share, rng.random((texts, width)), 0).astype(np.float32))


def test_scores_are_scikit_learns():
    import sklearn.metrics

    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        predicted, actual = rng.random(50) < share, rng.random(50) < 0.4
        assert f1_score(predicted, actual) == pytest.approx(sklearn.metrics.f1_score(actual, predicted))
        assert balanced_accuracy(predicted, actual) == pytest.approx(
            sklearn.metrics.balanced_accuracy_score(actual, predicted)
        )
    labels = np.array(["a"] * 3 + ["b"] * 5)
    assert always_yes_f1(labels) == pytest.approx(
        {name: sklearn.metrics.f1_score(labels == name, np.ones(8)) for name in "ab"}
    )
    assert f1_score(np.zeros(3, bool), np.zeros(3, bool)) == 0


def test_folds_keep_documents_together_and_classes_everywhere():
    labels, groups = problem(documents=7)
    folds = grouped_folds(labels, groups, 5)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(len(labels)))
    for train, test in folds:
        assert sorted([*train, *test]) == list(range(len(labels)))
        assert not set(groups[train]) & set(groups[test])
        assert set(labels[train]) == set(labels[test]) == set(labels)
    again, other = grouped_folds(labels, groups, 5), grouped_folds(labels, groups, 5, seed=1)
    assert all((one[1] == two[1]).all() for one, two in zip(folds, again, strict=True))
    assert any(len(one[1]) != len(two[1]) or (one[1] != two[1]).any() for one, two in zip(folds, other, strict=True))


def test_what_cannot_be_divided_is_refused():
    labels, groups = problem(documents=4)
    with pytest.raises(ValueError, match=r"3 classes have texts of fewer documents than the 5 folds.*class 0 \(4\)"):
        grouped_folds(labels, groups, 5)
    with pytest.raises(ValueError, match="there is only class 0"):
        grouped_folds(labels[labels == "class 0"], groups[labels == "class 0"])
    with pytest.raises(ValueError, match="folds must be at least 2"):
        grouped_folds(labels, groups, 1)
    counts = {"0": "a" * 15, "1": "b" * 19 + "c" * 15, "2": "a" * 29 + "b" * 19 + "c" * 17, "3": "a" * 9 + "b" * 20,
              "4": "a" * 17 + "c" * 25, "5": "bccc"}  # fmt: skip
    labels = np.array([label for text in counts.values() for label in text])
    groups = np.array([group for group, text in counts.items() for _ in text])
    with pytest.raises(ValueError, match="too uneven for 3 folds: one is left without class b"):
        grouped_folds(labels, groups, 3)


def test_a_planted_feature_is_found_and_noise_is_not():
    labels, groups = problem()
    rng = np.random.default_rng(0)
    noise = sparse_features(len(labels), 25, rng).toarray() - 0.1
    planted = noise.copy()
    # It is lower on the class than elsewhere.
    planted[:, 17] = (labels == "class 1") * -(0.5 + 0.1 * rng.random(len(labels)))
    folds = grouped_folds(labels, groups)
    found, nothing = (probe_features(table, labels, folds, candidates=8) for table in (planted, noise))
    planted_class = found["classes"]["class 1"]
    assert planted_class["f1"] == planted_class["best_test_f1"] == planted_class["balanced_accuracy"] == 1
    assert planted_class["features"] == [17] * 5
    assert planted_class["k_sparse"] == {"1": 1, "2": 1, "5": 1}
    # A third of the texts are of a class: whoever guesses gets at most 0.5, and half of the balanced texts right.
    assert nothing["f1"] < 0.5 and abs(nothing["balanced_accuracy"] - 0.5) < 0.1
    assert all(abs(accuracy - 0.5) < 0.1 for accuracy in nothing["k_sparse"].values())
    assert nothing["best_test_f1"] > nothing["f1"] + 0.05  # chosen on the test texts, even noise looks like something


def plain(table, labels, folds, candidates, signed):
    """The paper's protocol as its code has it, and the honest choice beside it."""
    import sklearn.metrics
    from sklearn.linear_model import LogisticRegression

    scores = {name: ([], [], []) for name in np.unique(labels)}
    for train, test in folds:
        for name, (f1, best, chosen) in scores.items():
            y = (labels == name).astype(int)
            difference = table[train][y[train] == 1].mean(0) - table[train][y[train] == 0].mean(0)
            order = np.argsort(-(difference if signed else abs(difference)), kind="stable")[:candidates]
            trained = []
            for feature in order:
                model = LogisticRegression(class_weight="balanced", solver="newton-cholesky", max_iter=200)
                model.fit(table[train][:, [feature]], y[train])
                trained.append([
                    sklearn.metrics.f1_score(y[side], model.predict(table[side][:, [feature]]))
                    for side in (train, test)
                ])  # fmt: skip
            index = int(np.argmax([on_train for on_train, _ in trained]))
            f1.append(trained[index][1])
            best.append(max(on_test for _, on_test in trained))
            chosen.append(int(order[index]))
    return scores


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_figures_are_those_of_plain_scikit_learn(kind):
    labels, groups = problem(classes=3, documents=6)
    rng = np.random.default_rng(1)
    table = sparse_features(len(labels), 30, rng).toarray().astype(np.float64)
    table[:, :9] += np.where(labels[:, None] == np.unique(labels)[np.arange(9) % 3], 0.2 * rng.random(9), 0)
    if kind == "dense":
        table = table - table.mean(0)
    folds = grouped_folds(labels, groups, 3)
    found = probe_features(csr_array(table) if kind == "sparse" else table, labels, folds, candidates=4)
    expected = plain(table, labels, folds, 4, signed=kind == "sparse")
    for name, (f1, best, chosen) in expected.items():
        of_class = found["classes"][name]
        assert of_class["f1_folds"] == pytest.approx(f1)
        assert of_class["f1"] == pytest.approx(np.mean(f1))
        assert of_class["best_test_f1"] == pytest.approx(np.mean(best))
        assert of_class["features"] == chosen
    means = np.mean([f1 for f1, _, _ in expected.values()], axis=0)
    assert found["f1"] == pytest.approx(means.mean())
    assert found["f1_error"] == pytest.approx(means.std(ddof=1) / 3**0.5)


def test_several_features_together_are_those_of_plain_scikit_learn():
    import sklearn.metrics
    from sklearn.linear_model import LogisticRegression

    labels, groups = problem(classes=3, documents=6)
    rng = np.random.default_rng(2)
    table = sparse_features(len(labels), 30, rng).toarray().astype(np.float64)
    table[:, :9] += np.where(labels[:, None] == np.unique(labels)[np.arange(9) % 3], 0.3 * rng.random(9), 0)
    folds = grouped_folds(labels, groups, 3)
    found = probe_features(csr_array(table), labels, folds, sparsities=(1, 3), candidates=2, seed=7)
    for index, name in enumerate(np.unique(labels)):
        accuracies = {"1": [], "3": []}
        for number, fold in enumerate(folds):
            train, test = balanced_fold(labels, name, fold, np.random.default_rng([7, number, index]))
            y = labels == name
            difference = table[train][y[train]].mean(0) - table[train][~y[train]].mean(0)
            for k, values in accuracies.items():
                columns = np.argsort(-abs(difference))[: int(k)]
                model = LogisticRegression(max_iter=1000).fit(table[train][:, columns], y[train])
                values.append(sklearn.metrics.accuracy_score(y[test], model.predict(table[test][:, columns])))
        assert found["classes"][name]["k_sparse"] == pytest.approx({k: np.mean(v) for k, v in accuracies.items()})


def test_balance_is_half_of_the_class_and_equal_parts_of_the_others():
    labels = np.array(["a"] * 40 + ["b"] * 100 + ["c"] * 30 + ["d"] * 50)
    train, test = np.arange(0, 220, 2), np.arange(1, 220, 2)
    for side in balanced_fold(labels, "a", (train, test), np.random.default_rng(0)):
        counts = dict(zip(*np.unique(labels[side], return_counts=True), strict=True))
        assert counts["a"] == 20 == counts["b"] + counts["c"] + counts["d"]
        assert all(6 <= counts[name] <= 7 for name in "bcd")
        assert len(set(side.tolist())) == 40
    # More of the class than of all others: no more of it are taken.
    train, _ = balanced_fold(labels[:110], "b", (np.arange(110), np.arange(110)), np.random.default_rng(0))
    assert (labels[train] == "b").sum() == (labels[train] == "a").sum() == 40


def test_a_probe_cannot_remember_documents():
    """Features that only say which document a text is of: with its texts on both sides they would tell classes."""
    labels, groups = problem(classes=2, documents=5, texts=16)
    features = csr_array((groups[:, None] == np.unique(groups)).astype(np.float32))
    alone = np.arange(len(labels)).astype(str)
    together, apart = (
        probe_features(features, labels, grouped_folds(labels, each), sparsities=(10,), candidates=1)["k_sparse"]["10"]
        for each in (groups, alone)
    )
    assert together == 0.5 and apart == 1


def test_standardised_probes_do_not_see_the_scale():
    labels, groups = problem(classes=2, documents=5)
    rng = np.random.default_rng(3)
    table = sparse_features(len(labels), 20, rng).toarray()
    table[:, 4] += (labels == "class 0") * 0.2
    scaled = table * 10 ** rng.uniform(-3, 3, 20)
    folds = grouped_folds(labels, groups)
    for make in (csr_array, np.asarray):
        plain_one, other = (
            probe_features(make(t), labels, folds, standardize=True, candidates=3) for t in (table, scaled)
        )
        assert plain_one["classes"]["class 0"]["features"] == other["classes"]["class 0"]["features"]
        assert plain_one["f1"] == pytest.approx(other["f1"])
        assert plain_one["k_sparse"] == pytest.approx(other["k_sparse"])
    raw, raw_scaled = (probe_features(csr_array(t), labels, folds, candidates=3) for t in (table, scaled))
    assert raw["classes"]["class 0"]["features"] != raw_scaled["classes"]["class 0"]["features"]


def test_features_that_never_vary_are_no_trouble(recwarn):
    """Fitted, they would make the solver warn, and tell classes apart by rounding errors."""
    labels, groups = problem(classes=2)
    for standardize in (False, True):
        found = probe_features(
            csr_array(np.zeros((len(labels), 3), dtype=np.float32)), labels, grouped_folds(labels, groups),
            standardize=standardize,
        )  # fmt: skip
        assert found["balanced_accuracy"] == found["k_sparse"]["5"] == 0.5
        assert found["f1"] == found["best_test_f1"] == 0
    assert not recwarn.list


def test_the_largest_of_equals_come_in_order():
    assert largest(np.array([1.0, 3.0, 3.0, 2.0, 3.0]), 4).tolist() == [1, 2, 4, 3]
    assert largest(np.array([1.0, 2.0]), 100).tolist() == [1, 0]


def test_plot_has_a_panel_for_each_problem(tmp_path, monkeypatch, drawn_figures):
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), save(figure, *a, **k)))
    labels, groups = problem(classes=2)
    table = sparse_features(len(labels), 6, np.random.default_rng(0))
    found = probe_features(table, labels, grouped_folds(labels, groups))
    problems = {name: {"neurons": found, "mxd": found} for name in ("domain", "era")}
    plot_probing(problems, tmp_path / "a.png", dict.fromkeys(problems, always_yes_f1(labels)))
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert [axes.get_title() for axes in saved[0].axes] == ["domain", "era"]
    assert [label.get_text() for label in saved[0].axes[0].get_yticklabels()] == ["neurons", "mxd"]

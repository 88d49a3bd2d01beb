"""Measure how well single experts tell classes of real texts apart, beside MLP neurons and other decompositions.

    python benchmarks/probing.py MODEL FOLDER... --corpus FOLDER [--layer 15] [--texts 100] [--work FOLDER]

Eight labelled problems (`benchmarks/probing_problems.py`) of chunks of 128 tokens, taken evenly from all documents of
a class and divided by document. One pass of the model over all texts feeds every representation; the protocols are
those of `mxd.evaluation.probing`, with features as they are and standardised. Pooled features and figures that are in
the work folder are not computed again. The decompositions are of one layer; differences are to the first. Writes
benchmarks/results/probing.json. With one decomposition of SmolLM2-135M this takes 10 minutes of one core.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from probing_problems import problems
from report import markdown_table
from scipy.sparse import load_npz, save_npz
from transformers import PreTrainedTokenizerBase

from mxd.base.base_model import load_base_model
from mxd.data.labelled_text import LabelledTexts, count_texts, cut_texts
from mxd.evaluation import always_yes_f1, grouped_folds, pool_features, probe_features
from mxd.evaluation.pooling import Features
from mxd.evaluation.probing import CANDIDATES, FOLDS, SPARSITIES
from mxd.jobs.decompositions import load_decomposition
from mxd.jobs.probe import common_layer, describe, make_representations, named
from mxd.modeling_mxd import MxDModel, find_mlp

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "probing.json"
SHOWN = ("MLP neurons", "transcoder", "skip transcoder", "MxD")  # in the table by problem
CONTEXT = 128
WAYS = {"published": False, "standardised": True}
"""Scaling of features → whether they are standardised."""


def digest(*values: object) -> str:
    """Return a short hash of the settings that results depend on."""
    return hashlib.blake2b(repr(values).encode(), digest_size=6).hexdigest()


def identity(name: str, folder: str | None) -> str:
    """Return a representation's name in the work folder, with a hash of a decomposition's weights."""
    if folder is None:
        return name.lower().replace(" ", "-")
    if not Path(folder).is_dir():  # a Hub id
        return folder.replace("/", "--")
    weights = hashlib.blake2b(digest_size=6)
    for path in sorted(Path(folder).glob("*.safetensors")):
        weights.update(path.read_bytes())
    return f"{Path(folder).name}-{weights.hexdigest()}"


def cut(corpus: Path, tokenizer: PreTrainedTokenizerBase, texts: int, seed: int) -> dict[str, LabelledTexts]:
    """Return the texts of every problem."""
    return {
        name: cut_texts(documents, tokenizer, context_length=CONTEXT, texts_per_class=texts, seed=seed)
        for name, documents in problems(corpus).items()
    }


def save(path: Path, features: Features) -> None:
    """Save features in one move, so that an interruption leaves no half file."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    np.save(unfinished, features) if isinstance(features, np.ndarray) else save_npz(unfinished, features)
    unfinished.replace(path)


def load(path: Path) -> Features:
    """Load features that `save` wrote."""
    loaded: Features = np.load(path) if path.suffix == ".npy" else load_npz(path)
    return loaded


def pooled(
    options: argparse.Namespace,
    texts: Mapping[str, LabelledTexts],
    folder: Path,
    decompositions: Mapping[str, MxDModel],
    sources: Mapping[str, str],
    model: Any,
) -> dict[str, Path]:
    """Pool the features of all problems' texts, in one pass for all representations that are missing."""
    where = next(iter(decompositions.values())).config.where
    found = make_representations(find_mlp(model, options.layer, **where), decompositions)
    paths = {
        name: folder / f"{identity(name, sources.get(name))}.{'npz' if name in decompositions else 'npy'}"
        for name in found
    }
    missing = {name: item for name, item in found.items() if not paths[name].exists()}
    if missing:
        ids = [text for of_problem in texts.values() for text in of_problem.ids]
        started = time.monotonic()
        made = pool_features(model, options.layer, ids, missing, pooling=options.pooling, progress=True, **where)
        for name, features in made.items():
            save(paths[name], features)
        seconds = {"representations": list(missing), "texts": len(ids), "seconds": time.monotonic() - started}
        (folder / f"pass-{digest(*missing)}.json").write_text(json.dumps(seconds) + "\n")
    return paths


def probed(
    options: argparse.Namespace, texts: Mapping[str, LabelledTexts], path: Path, folder: Path
) -> dict[str, dict[str, Any]]:
    """Probe one representation, or read its figures from the work folder: {problem: {way: figures}}."""
    features: Features | None = None
    found: dict[str, dict[str, Any]] = {}
    start = 0
    for problem, of_problem in texts.items():
        rows = slice(start, start := start + len(of_problem.ids))
        result = (
            folder
            / f"{path.stem}-{problem.replace(' ', '-')}-{digest(options.seed, FOLDS, CANDIDATES, SPARSITIES)}.json"
        )
        if not result.exists():
            features = load(path) if features is None else features
            folds = grouped_folds(of_problem.labels, of_problem.groups, FOLDS, options.seed)
            how: dict[str, Any] = {"candidates": CANDIDATES, "sparsities": SPARSITIES, "seed": options.seed}
            figures = {
                way: probe_features(features[rows], of_problem.labels, folds, standardize=standardize, **how)
                for way, standardize in WAYS.items()
            }
            result.write_text(json.dumps(figures) + "\n")
        found[problem] = json.loads(result.read_text())
    return found


def mean_f1(found: Mapping[str, Mapping[str, Any]], way: str = "published") -> tuple[float, float]:
    """Return the mean over problems and its standard error, with the folds of all problems as independent."""
    errors = [figures[way]["f1_error"] for figures in found.values()]
    mean = float(np.mean([figures[way]["f1"] for figures in found.values()]))
    return mean, math.sqrt(sum(error**2 for error in errors)) / len(errors)


def difference(
    found: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Mapping[str, Any]], way: str = "published"
) -> tuple[float, float]:
    """Return the mean difference in F1 over problems and its standard error, paired by fold."""
    apart = [
        np.subtract(figures[way]["f1_folds"], reference[problem][way]["f1_folds"]) for problem, figures in found.items()
    ]
    errors = [float(of_folds.std(ddof=1)) / math.sqrt(len(of_folds)) for of_folds in apart]
    return float(np.mean([of_folds.mean() for of_folds in apart])), math.sqrt(sum(e**2 for e in errors)) / len(errors)


def table(results: Mapping[str, Any]) -> str:
    """Return the means over problems as a Markdown table."""
    found, reference = results["representations"], results["reference"]
    problems_of = list(next(iter(found.values())))
    head = ["", "mean F1", f"to {reference}", "best test F1", *(f"k = {k}" for k in SPARSITIES)]
    chance = np.mean([np.mean([*of_classes.values()]) for of_classes in results["always_yes_f1"].values()])
    rows = [["(always yes)", f"{chance:.3f}", "–", "–", *["0.500"] * len(SPARSITIES)]]
    for name, figures_of in found.items():
        figures = [figures_of[problem]["published"] for problem in problems_of]
        mean, error = mean_f1(figures_of)
        apart, apart_error = difference(figures_of, found[reference])
        cells = [
            name,
            f"**{mean:.3f}** ± {error:.3f}",
            "–" if name == reference else f"{apart:+.3f} ± {apart_error:.3f}",
            f"{np.mean([each['best_test_f1'] for each in figures]):.3f}",
            *(f"{np.mean([each['k_sparse'][str(k)] for each in figures]):.3f}" for k in SPARSITIES),
        ]
        rows.append(cells)
    counts, settings = results["problems"], results["settings"]
    texts = sum(count["texts"] for of_problem in counts.values() for count in of_problem.values())
    return markdown_table(head, rows) + (
        f"\n{len(counts)} problems, {sum(map(len, counts.values()))} classes, {texts:,} texts of at most {CONTEXT} "
        f"tokens, layer {settings['layer']}, {settings['pooling']} pooling, {FOLDS} folds by document. ±: one standard "
        f"error over folds, of differences to {reference} paired by fold. k: accuracy of k-sparse probes on balanced "
        "texts.\n"
    )


def table_by_problem(results: Mapping[str, Any]) -> str:
    """Return the F1 of the best single feature as a Markdown table, a row for each problem."""
    rows = []
    for problem, of_classes in results["always_yes_f1"].items():
        found = [results["representations"][name][problem]["published"]["f1"] for name in SHOWN]
        rows.append([problem, *(f"{each:.3f}" for each in (np.mean([*of_classes.values()]), *found))])
    return markdown_table(["", "(always yes)", *SHOWN], rows)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Pool and probe what is missing; return the content of results/probing.json."""
    sources = named(options.folders)
    decompositions = {name: load_decomposition(folder) for name, folder in sources.items()}
    options.layer = common_layer(decompositions, options.layer)
    model, tokenizer, _ = load_base_model(options.model, dtype=options.dtype)
    texts = cut(options.corpus, tokenizer, options.texts, options.seed)
    contents = [(name, each.ids, each.labels.tolist(), each.groups.tolist()) for name, each in texts.items()]
    base = identity("", options.model)
    folder = options.work / digest(options.layer, options.pooling, options.dtype, base, contents)
    folder.mkdir(parents=True, exist_ok=True)
    paths = pooled(options, texts, folder, decompositions, sources, model)
    started = time.monotonic()
    found = {name: probed(options, texts, path, folder) for name, path in paths.items()}
    return {
        "reference": next(iter(sources)),
        "representations": found,
        "problems": {name: count_texts(of_problem) for name, of_problem in texts.items()},
        "always_yes_f1": {name: always_yes_f1(of_problem.labels) for name, of_problem in texts.items()},
        "settings": {
            "layer": options.layer,
            "pooling": options.pooling,
            "dtype": options.dtype,
            "texts_per_class": options.texts,
            "context_length": CONTEXT,
            "folds": FOLDS,
            "candidates": CANDIDATES,
            "seed": options.seed,
            **describe(decompositions, options.layer),
            "base_model": Path(options.model).name,
        },
        "seconds": {
            "pass": [json.loads(path.read_text()) for path in sorted(folder.glob("pass-*.json"))],
            "probes": round(time.monotonic() - started, 1),
        },
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--layer", type=int, help="[the only one that all decompositions have]")
    parser.add_argument("--texts", type=int, default=100, help="of a class at most")
    parser.add_argument("--pooling", choices=("mean", "max"), default="mean")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/probing"))
    parser.add_argument("--results", type=Path, help="write the results there instead")
    options = parser.parse_args()
    results = measure(options)
    (options.results or RESULTS).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What `benchmarks/recipe.py` trains and measures: its tables, and the recipes in them."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

PASSES = (3, 10)
SHARES = (0.0, 0.25, 0.6)
# Of every layer, the recording that it is in and its share of `--tokens`; one teacher pass makes each.
RECORDINGS = {15: ("recording", 1.0), 5: ("others", 0.5), 25: ("others", 0.5)}
CORPUS, PYTHON = "corpus", "python"
NOT_TRAINED_ON = "Another kind of text than that of the training, Python sources"
EVERY_K = "Every K, one pass"
EVERY_K_NOT_TRAINED_ON = "Every K, one pass, Python sources"
KS = (16, 32, 64, 128, 256)
SEEDS = (0, 1, 2)
BASELINE = {"learning_rate": 3e-3}  # what the command line gives a transcoder
CODE, NO_CODE = {"auxiliary_weight": 1.0}, {"auxiliary_weight": 0.0}


@dataclass(frozen=True)
class Point:
    """A recipe: what is trained and how.

    Attributes:
        method, layer, num_experts_per_tok: of the decomposition; it has a transcoder's parameters (m = 32).
        passes: over the recorded tokens.
        training: arguments that differ from the defaults.
    """

    method: str = "mxd"
    layer: int = 15
    num_experts_per_tok: int = 32
    passes: float = 1
    seed: int = 0
    training: dict[str, Any] = field(default_factory=dict)


def _points() -> dict[str, dict[str, Point]]:
    """By table: name and point."""
    skip, transcoder = Point("skip_transcoder", training=BASELINE), Point("transcoder", training=BASELINE)
    default, plain = Point(training=CODE), Point(training=NO_CODE)
    both = {"MxD": default, "skip transcoder": skip}
    variants = {"MxD": default, "MxD, no sparse code": plain, "skip transcoder": skip}
    sparser = {name: replace(point, num_experts_per_tok=16) for name, point in both.items()}
    longer = {passes: {name: replace(point, passes=passes) for name, point in variants.items()} for passes in PASSES}
    longest = {f"{name}, K = 32, {PASSES[-1]} passes": point for name, point in longer[PASSES[-1]].items()}
    shares = {f"MxD, {share}": Point(training={"min_mean_ablation_error": share} | NO_CODE) for share in SHARES}
    removed: dict[str, dict[str, Any]] = {
        "nothing removed": {},
        "no min_mean_ablation_error": {"min_mean_ablation_error": 0.0},
        "gate from nn.Linear": {"gate_init": "random"},
        "encoder from nn.Linear": {"encoder_init": "random"},
        "decoder from 0": {"decoder_init": "zero"},
        "Cᵀa from around 0": {"modulation_init": "random"},
        "slow gate, fast C": {"gate_learning_rate_factor": 0.3, "modulation_learning_rate_factor": 3.0},
        "no scaling": {"scale_activations": False},
        "no least norm": {"minimum_relative_norm": 0.0},
    }
    every_k = {
        f"{name}, K = {k}": replace(point, num_experts_per_tok=k)
        for name, point in {"transcoder": transcoder, **variants}.items()
        for k in KS
    }
    seeds = {f"{name}, seed {seed}": replace(point, seed=seed) for name, point in variants.items() for seed in SEEDS}
    layers = {
        f"{name}, layer {layer}": replace(point, layer=layer, passes=0.5 / share)
        for layer, (_, share) in RECORDINGS.items()
        for name, point in variants.items()
    }
    return {
        "K = 32, one pass": both,
        NOT_TRAINED_ON: {
            f"{name}, K = {point.num_experts_per_tok}": point for few in (both, sparser) for name, point in few.items()
        }
        | longest,
        "Layers, half a million tokens": layers,
        "K = 16, one pass": sparser,
        **{f"K = 32, {passes} passes": points for passes, points in longer.items()},
        "Sparse code": {
            f"MxD, {amount}, {what} sparse code": replace(point, passes=passes)
            for passes, amount in ((0.5, "half a pass"), (1, "one pass"))
            for what, point in (("with its", default), ("no", plain))
        },
        "Shares, one pass, no sparse code": {
            "transcoder": transcoder,
            "skip transcoder": skip,
            "MxD, 0.45 (default)": plain,
            **shares,
        },
        "Rates, one pass, no sparse code": {
            f"MxD, 0.4, gate × {gate}, C × {modulation}": Point(
                training=NO_CODE
                | {
                    "min_mean_ablation_error": 0.4,
                    "gate_learning_rate_factor": gate,
                    "modulation_learning_rate_factor": modulation,
                }
            )
            for gate, modulation in ((1.0, 1.0), (0.3, 3.0))
        },
        "Without a part, half a pass": {
            name: Point(passes=0.5, training=training | CODE) for name, training in removed.items()
        }
        | {"no sparse code": replace(plain, passes=0.5)},
        "Without a part, half a pass, no sparse code": {
            name: Point(passes=0.5, training=training | NO_CODE) for name, training in removed.items()
        },
        "Without a part, one pass, no sparse code": {
            name: Point(training=removed[name] | NO_CODE)
            for name in ("nothing removed", "Cᵀa from around 0", "no scaling")
        },
        "Seeds, one pass": seeds,
        EVERY_K: every_k,
        EVERY_K_NOT_TRAINED_ON: every_k,
    }


TABLES = _points()


def distinct() -> dict[str, Point]:
    """Every point once, by the folder that it is in: tables share points."""
    return {folder_name(point): point for table in TABLES.values() for point in table.values()}


def folder_name(point: Point) -> str:
    """Of a point's settings."""
    return hashlib.sha256(json.dumps(asdict(point), sort_keys=True).encode()).hexdigest()[:12]


def text_of(title: str) -> str:
    """What a table's points are measured on."""
    return PYTHON if title in (NOT_TRAINED_ON, EVERY_K_NOT_TRAINED_ON) else CORPUS

"""Check that a pushed decomposition loads with torch and transformers alone, and with which versions of transformers.

    python benchmarks/compatibility.py

Decompositions of the embedded model are pushed to a Hub on loopback, and so is the embedded model. For each version of
transformers a fresh virtual environment gets the pinned torch, that transformers, and nothing else; for the versions
that the library supports, a second one gets the library too. In each, AutoModel and AutoModelForCausalLM load the
repos, from the Hub and then offline from the cache, and what they compute, also while it is steered, is compared with
what the pusher computed, bit by bit. One of two layers writes to two MLPs. Among the repos are two of equal last name
and different code, one with a dot in its id, and a folder with a space in its name. Writes
benchmarks/results/compatibility.json; exits with 1 if anything differs.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "compatibility.json"
# The oldest that repos are loaded with, the last 4.x, the first 5, the oldest that the library itself supports (in
# pyproject.toml), the pinned one, and the newest that the package index has.
VERSIONS = ("4.56.0", "4.57.6", "5.0.0", "5.6.0", "pinned", "newest")
OF_LIBRARY = (5, 6)
BASE, REPO = "user/embedded", "user/mxd-embedded"
# Of equal last name as REPO, with other code and weights; and with a dot, which is no name of a Python module, and from
# which transformers 4.56 imports nothing.
SAME_NAME, WITH_DOT = "other/mxd-embedded", "user/mxd-embedded-v1.5"
ORIGIN = "SOURCE_OF_THIS_CODE"
LAYERS = (1, 3)
STEERING = {
    "format_version": 1,
    "changes": [
        {"layer": 1, "expert": 3, "strength": 2.0},
        {"layer": 3, "expert": 5, "strength": 4.0, "positions": "generated"},
        {"layer": 3, "expert": 9, "strength": 4.0, "by": "add", "when": {"layer": 1, "expert": 7}},
    ],
}


def pin(package: str) -> str:
    """The version in constraints.txt."""
    found = re.search(rf"^{package}==(.+)$", (HERE.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def make_environment(folder: Path, version: str, library: bool) -> Path:
    """A fresh virtual environment; its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    wanted = "transformers" if version == "newest" else f"transformers=={version}"
    packages = [f"torch=={pin('torch')}", wanted] + ([str(HERE.parent)] if library else [])
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return folder / "bin" / "python"


def push(hub: Any, expected: Path) -> None:
    """Push base and decomposition; what they compute goes into the file `expected`."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mxd import demo
    from mxd.base.pretrained_weights import record_base
    from mxd.hub_cards import push_decomposition
    from mxd.modeling_mxd import MxDConfig, MxDModel

    hub.create(BASE, {path.name: path.read_bytes() for path in demo.model_path().iterdir()})
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = MxDConfig(
        layers=list(LAYERS),
        base_model_name_or_path=BASE,
        hidden_size=base.config.hidden_size,
        intermediate_size=base.config.intermediate_size,
        num_experts=256,
        num_experts_per_tok=8,
        hidden_act=base.config.hidden_act,
        encoder_type="glu",
        layer_overrides={"1": {"num_output_layers": 2, "output_size": 2 * base.config.hidden_size}},
    )
    torch.manual_seed(0)
    outcomes = {}
    for repo in (REPO, SAME_NAME, WITH_DOT):
        decomposition = MxDModel(config)
        for tensor in (*decomposition.parameters(), *decomposition.buffers()):
            nn.init.normal_(tensor, std=0.05)
        sizes = {index: decomposition.config.layer(index) for index in LAYERS}
        decomposition.set_directions(
            {index: torch.rand(size.num_experts) + 0.5 for index, size in sizes.items()},
            {index: torch.randn(size.num_experts, size.output_size) for index, size in sizes.items()},
            "random",
        )
        record_base(decomposition, base)
        with tempfile.TemporaryDirectory() as folder:
            decomposition.save_pretrained(folder)
            AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
            Path(folder, "steering.json").write_text(json.dumps(STEERING))
            push_decomposition(folder, repo)
        layers = hub.files(repo)["layers.py"] + f"\n{ORIGIN} = {repo!r}\n".encode()
        hub.repos[repo].add("main", {**hub.files(repo), "layers.py": layers}, "code of its own")
        with decomposition.spliced(base):
            outcomes[repo] = computed(base, decomposition)
            with decomposition.steer(base, STEERING["changes"]):
                outcomes[repo]["steered"] = computed(base)
    torch.save({**outcomes, "base": computed(base, decomposition)}, expected)


def computed(model: Any, decomposition: Any = None) -> dict[str, Any]:
    """Logits, tokens chosen greedily, and the outputs of a decomposition's layers."""
    import torch

    ids = torch.arange(10, 42).reshape(2, 16)
    x = torch.linspace(-2, 2, 4 * model.config.hidden_size).sin().reshape(4, -1)
    with torch.no_grad():
        return {
            "logits": model(ids).logits,
            "tokens": model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2),
            "layers": [decomposition(x, layer=layer).output for layer in LAYERS if decomposition is not None],
        }


def origin(decomposition: Any) -> str | None:
    """Return the repo whose code a decomposition's layers run."""
    module = sys.modules[type(decomposition.layer(LAYERS[0])).__module__]
    return getattr(module, ORIGIN, None)


def load(expected: str, library: bool) -> None:
    """Load by both Auto classes in an environment of its own, compute, compare, and print the outcome."""
    if library:
        from mxd import MxDModel  # noqa: F401, so that the library's classes are the ones that load
    import huggingface_hub
    import torch
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, pipeline

    torch.set_num_threads(1)
    want = torch.load(expected, weights_only=False)
    # The dtype is said, since without it 4.x loads in float32 what 5.x loads in the dtype of the file.
    how = {"trust_remote_code": True, "dtype": torch.float32}
    decomposition = AutoModel.from_pretrained(REPO, **how)
    one = AutoModel.from_pretrained(REPO, layers=[LAYERS[1]], **how)
    model = AutoModelForCausalLM.from_pretrained(REPO, **how)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    got, untouched = computed(model, decomposition), computed(base, decomposition)
    with decomposition.spliced(base):
        by_hand = computed(base, decomposition)
    with tempfile.TemporaryDirectory(prefix="saved again ") as folder:  # the space is one of the cases
        model.save_pretrained(folder)
        again = computed(AutoModelForCausalLM.from_pretrained(folder, **how), decomposition)
    steered = computed(AutoModelForCausalLM.from_pretrained(REPO, steering="steering.json", **how))
    others = {}
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 57)
    for repo in (SAME_NAME,) if old else (SAME_NAME, WITH_DOT):
        other = AutoModelForCausalLM.from_pretrained(repo, **how)
        others[repo] = (computed(other, other.decomposition), origin(other.decomposition))
    written = pipeline("text-generation", REPO, trust_remote_code=True)("The state of the", max_new_tokens=4)
    outcome = {
        "transformers": transformers.__version__,
        "huggingface_hub": huggingface_hub.__version__,
        "torch": torch.__version__,
        "code": "library" if type(decomposition).__module__.startswith("mxd.") else "repo",
    }
    checks = {
        "layers equal the pusher's": all(map(torch.equal, got["layers"], want[REPO]["layers"])),
        "logits equal the pusher's": torch.equal(got["logits"], want[REPO]["logits"]),
        "tokens equal the pusher's": torch.equal(got["tokens"], want[REPO]["tokens"]),
        "base's logits equal the pusher's": torch.equal(untouched["logits"], want["base"]["logits"]),
        "logits equal a splice by hand": torch.equal(got["logits"], by_hand["logits"]),
        "logits equal after saving and loading": torch.equal(got["logits"], again["logits"]),
        **{
            f"{name} equal the pusher's while steered": torch.equal(steered[name], want[REPO]["steered"][name])
            and not torch.equal(steered[name], got[name])
            for name in ("logits", "tokens")
        },
        "one layer alone loads": one.config.layers == [LAYERS[1]],
        **{
            f"{repo} gives its own": torch.equal(found["logits"], want[repo]["logits"])
            for repo, (found, _) in others.items()
        },
        "every repo runs its own code": library
        or [origin(decomposition), *(found for _, found in others.values())] == [REPO, *others],
        "the pipeline writes": len(written[0]["generated_text"]) > len("The state of the"),
    }
    print(json.dumps({**outcome, "checks": checks}))  # noqa: T201


def measure(python: Path, library: bool, hub: Any, expected: Path, scratch: Path) -> list[dict[str, Any]]:
    """Outcomes from the Hub and then from the cache."""
    home = scratch / f"home-{python.parent.parent.name}"
    outcomes = []
    for offline in (False, True):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        requests = len(hub.requests)
        command = [str(python), __file__, "--load", str(expected), *(["--library"] if library else [])]
        done = subprocess.run(
            command, check=False, cwd=scratch, env=environment, capture_output=True, text=True, timeout=600
        )
        where = {"library installed": library, "offline": offline, "requests": len(hub.requests) - requests}
        if done.returncode:
            version = python.parent.parent.name.removesuffix("-library")
            outcomes.append({**where, "transformers": version, "error": done.stderr.strip().splitlines()[-1]})
            print(done.stderr, file=sys.stderr)  # noqa: T201
        else:
            outcomes.append({**where, **json.loads(done.stdout.splitlines()[-1])})
        print(json.dumps(outcomes[-1]), flush=True)  # noqa: T201
    return outcomes


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="of transformers; 'pinned' and 'newest' too")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--library", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load, options.library)
        return
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "hub_cards")]
    from loopback_hub import HubServer

    outcomes: list[dict[str, Any]] = []
    with HubServer() as hub, tempfile.TemporaryDirectory() as temporary:
        scratch, expected = Path(temporary), Path(temporary) / "expected.pt"
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(scratch / "pusher")}
        os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        push(hub, expected)
        for name in options.versions:
            version = pin("transformers") if name == "pinned" else name
            for library in (False, True):
                if library and version != "newest" and tuple(map(int, version.split(".")[:2])) < OF_LIBRARY:
                    continue  # what a repo carries needs less
                python = make_environment(scratch / f"{version}{'-library' * library}", version, library)
                outcomes += measure(python, library, hub, expected, scratch)
    passed = all("checks" in outcome and all(outcome["checks"].values()) for outcome in outcomes)
    results = {"python": platform.python_version(), "passed": passed, "outcomes": outcomes}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(not passed)


if __name__ == "__main__":
    main()

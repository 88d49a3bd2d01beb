"""The hostile-input table: what a stranger may put into a repo or a folder, as data and one runner.

A case changes some files of a good decomposition and says by which ways it comes in: commands, doors. By each way it
must be refused (a command: exit code 1 and one message), or, by those that it names as harmless, change nothing. It is
broken if it takes over `SECONDS`, allocates over `BYTES`, runs code (which would leave a canary), prints a traceback or
a character that steers a terminal, or reads a pickle.
"""

import contextlib
import json
import os
import pickle
import resource
import shutil
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from faults import COMPLETE, REFUSED, REPO, Outcome, Scene, by_command, by_door
from huggingface_hub import constants
from safetensors.torch import load, save
from scenes import BASE
from transformers import AutoModel, AutoModelForCausalLM

SECONDS, BYTES = 10, 2**30
EVIL = "user/evil"
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NAME = "layers.0.output_bias"

# The ways in.
SHOW, SEARCH, PUSH, EVALUATE = "mxd show", "mxd search", "mxd push", "mxd evaluate"
MODEL, LM = "AutoModel", "AutoModelForCausalLM"
REMOTE = "the repo's own code"  # AutoModelForCausalLM where the library is not installed, and the code is trusted
UNTRUSTED = "no trust"  # where it is not, and the code is not trusted
DOORS = (MODEL, LM, REMOTE)
READERS = (SHOW, PUSH, EVALUATE, *DOORS)


@dataclass(frozen=True)
class Case:
    """`files`: what changes: bytes, None for a file that is not there, or a function of the good one's bytes.
    `harmless`: ways by which it is not refused, since what is hostile in it is not used. `says`: what the commands'
    refusals contain."""

    group: str
    name: str
    files: Mapping[str, Any]
    ways: tuple[str, ...] = READERS
    harmless: tuple[str, ...] = ()
    says: str = ""
    repos: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)


def changed(**values):
    """config.json with other values; NaN and the like as JSON's reader takes them."""

    def change(good):
        return json.dumps({**json.loads(good), **values}).encode()

    return {"config.json": change}


def config(name, says="", harmless=(), ways=READERS, repos=None, **values):
    return Case("config", name, changed(**values), ways, harmless, says, repos or {})


def raw(name, content, **how):
    return Case("config", name, {"config.json": content}, **how)


def header(change):
    """A safetensors file with another header before the same data."""

    def build(good):
        size = struct.unpack("<Q", good[:8])[0]
        head = change(json.loads(good[8 : 8 + size]))
        head = head if isinstance(head, bytes) else json.dumps(head).encode()
        return struct.pack("<Q", len(head)) + head + good[8 + size :]

    return build


def entry(**values):
    def change(head):
        head[NAME] = {**head[NAME], **values}
        return head

    return header(change)


def twice(head):
    text = json.dumps(head)
    return (text[:-1] + f', "{NAME}": ' + json.dumps(head[NAME]) + "}").encode()


def overlapping(head):
    names = [name for name in head if name != "__metadata__"]
    first = min(names, key=lambda name: head[name]["data_offsets"][0])
    shape, offsets = head[first]["shape"], head[first]["data_offsets"]
    head[names[-1]] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    return head


def tensors(change):
    def build(good):
        weights = load(good)
        change(weights)
        return save(weights, metadata={"format": "pt"})

    return build


def weights(name, build, says="", harmless=(SHOW,), ways=READERS, **more):
    return Case("safetensors", name, {SHARD: build, **more}, ways, harmless, says)


def index(name, build, ways=(PUSH, *DOORS), harmless=(), says="", **more):
    return Case("index", name, {INDEX: build, **more}, ways, harmless, says)


def in_index(**values):
    return lambda good: json.dumps({**json.loads(good), **values}).encode()


def mapped_to(file):
    def build(good):
        values = json.loads(good)
        values["weight_map"][NAME] = file
        return json.dumps(values).encode()

    return build


def evaluation(name, content, says="", harmless=(), ways=(SHOW, PUSH, EVALUATE)):
    return Case("evaluation.json", name, {"evaluation.json": content}, ways, harmless, says)


def card(name, text, says="", harmless=(SHOW, SEARCH), ways=(SHOW, SEARCH, PUSH)):
    text = text if isinstance(text, bytes) else text.encode()
    return Case("card", name, {"README.md": text}, ways, harmless, says)


def other(name, files, ways=READERS, harmless=(), says="", repos=None):
    return Case("other files", name, files, ways, harmless, says, repos or {})


def nested(depth, opening=b"[", closing=b"]"):
    return opening * depth + closing * depth


class Canary:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return os.system, ("touch $MXD_CANARY",)


PICKLE = pickle.dumps(Canary())
CODE = b"import os, pathlib\npathlib.Path(os.environ['MXD_CANARY']).touch()\nraise ValueError('code was run')\n"
CODE_CONFIG = {
    "model_type": "evil",
    "auto_map": {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")},
}
CODE_REPO = {"evil/code": {"config.json": json.dumps(CODE_CONFIG).encode(), "evil.py": CODE}}
ELSEWHERE = {name: "evil/code--evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
PICKLED_REPO = {"evil/pickled": {"config.json": json.dumps(LLAMA).encode(), "pytorch_model.bin": PICKLE}}
HUGE_LLAMA = {**LLAMA, "vocab_size": 10**8, "hidden_size": 2**14, "intermediate_size": 2**20}
HUGE_REPO = {"evil/huge": {"config.json": json.dumps(HUGE_LLAMA).encode(), "model.safetensors": save({})}}
STEERING = "\x1b]0;owned\x07\x1b[2J\u202e\x00"
LARGE = 2**31 - 1
MILLION = 10**6

CASES = [
    # Sizes
    *(
        config(f"num_experts {name}", "num_experts", num_experts=value)
        for name, value in {
            "10^12": 10**12, "negative": -1, "zero": 0, "NaN": float("nan"), "infinite": float("inf"), "true": True,
            "a text": "24", "a list": [24], "null": None, "a fraction": 24.5,
        }.items()
    ),  # fmt: skip
    raw(
        "num_experts of 100,000 digits",
        lambda good: good.replace(b'"num_experts": 24', b'"num_experts": ' + b"9" * 10**5),
    ),
    config("hidden_size 10^12", "hidden_size", hidden_size=10**12),
    config("K above N", "must not exceed", num_experts_per_tok=25),
    config(
        "all sizes 2^31 - 1", "this machine has", (SHOW,), num_experts=LARGE, hidden_size=LARGE, intermediate_size=LARGE
    ),
    config("other sizes than the weights'", "shape", (SHOW,), num_experts=23),
    config("vocab_size a text", "vocab_size", vocab_size="x" * 100),
    # Layers
    config("10^6 layers", "layers must be at most", layers=list(range(MILLION))),
    config("a layer 10^12", "layers must be whole", layers=[10**12]),
    config("a negative layer", "layers must be whole", layers=[-1]),
    config("a layer twice", "more than once", layers=[0, 0]),
    config("layers of lists", "layers must be whole", layers=[[0]]),
    config("layers a text", "layers must be a list", layers="02"),
    config("no layers", "names no layers", layers=[]),
    config("1,000 layers, weights of two", "no weights named", (SHOW,), layers=list(range(1000))),
    config("a layer that the base has not", "no weights named", (SHOW,), layers=[0, 99]),
    config("10^5 layer_overrides", "layer_overrides", layer_overrides={str(n): {"num_experts": n} for n in range(10**5)}),
    config("an override of 10^12", "layer 2: num_experts", layer_overrides={"2": {"num_experts": 10**12}}),
    config("an override of an unknown field", "unknown field", layer_overrides={"2": {"__class__": "x"}}),
    config("overrides that are no mapping", "layer_overrides must map", layer_overrides=[1]),
    # Texts
    config("an activation that is code", "hidden_act", hidden_act="__import__('os').system('touch $MXD_CANARY')"),
    config("an activation that is a mapping", "hidden_act", hidden_act={"a": 1}),
    config("a site that is no site", "site must be", site="../../etc"),
    config("a name of 5 MB", "base_model_name_or_path", base_model_name_or_path="x" * 5_000_000),
    config("a name that steers the terminal", "printable", base_model_name_or_path=f"user/{STEERING}"),
    config("a revision that steers the terminal", "printable", base_model_revision=STEERING),
    config("an unknown field of 20 MB", "larger than", extra="x" * 20_000_000),
    config("an unknown field that steers the terminal", harmless=READERS, **{STEERING: STEERING}),
    # The file
    raw("100,000 lists in each other", nested(10**5), says="no JSON"),
    raw("100,000 objects in each other", b'{"model_type": "mxd", "a": ' + nested(10**5, b'{"a":', b"}") + b"}"),
    raw("a list", b"[1, 2]", says="must hold a JSON object"),
    raw("empty", b"", says="no JSON"),
    raw("not UTF-8", b'{"model_type": "mxd\xff"}', says="no JSON"),
    raw("not there", None, says="no config.json"),
    raw("another model's", json.dumps(LLAMA).encode(), says="no decomposition", ways=(SHOW, PUSH, EVALUATE)),
    # What transformers takes from a config
    config("a name of one of its methods", "no field", check_memory=None),
    config("a name of a property", "no field", num_parameters=1),
    config("attribute_map", "no field", attribute_map={"num_experts": "evil"}, evil=10**12),
    config("10^9 labels", "num_labels", num_labels=10**9),
    config("labels that are no labels", "", id2label={"x": "y"}),
    config("labels a number", "", id2label=5),
    config("a dtype that is a function", "dtype", dtype="load"),
    config("a torch_dtype that is none", "torch_dtype", torch_dtype="evil"),
    config("a quantisation", "quantization_config", quantization_config={"quant_method": "evil"}),
    config("weights elsewhere", "transformers_weights", transformers_weights="../evil.safetensors"),
    config("configs elsewhere", "configuration_files", configuration_files=["../config.1.0.json"]),
    # Whose code
    config("code of another repo", harmless=(SHOW, PUSH, EVALUATE, MODEL, LM), auto_map=ELSEWHERE, repos=CODE_REPO,
           ways=(SHOW, PUSH, EVALUATE, MODEL, LM, UNTRUSTED)),
    config("code outside of the repo", harmless=(SHOW, PUSH, EVALUATE, MODEL, LM),
           auto_map={"AutoConfig": "../../evil.Evil"}, ways=(SHOW, PUSH, EVALUATE, MODEL, LM, UNTRUSTED)),
    other("the repo's own code is other code",
          {"modeling_mxd.py": CODE, "configuration_mxd.py": CODE, "layers.py": CODE, "torch.py": CODE},
          ways=(SHOW, PUSH, EVALUATE, MODEL, LM, UNTRUSTED), harmless=(SHOW, PUSH, EVALUATE, MODEL, LM)),
    # The base model
    config("no base model", "", (SHOW, MODEL), base_model_name_or_path=None),
    config("a base that is a folder here", "", (SHOW, MODEL), base_model_name_or_path="/etc"),
    config("a base outside", "", (SHOW, MODEL), base_model_name_or_path="../../../etc/passwd"),
    config("a base by its address", "", (SHOW, MODEL), base_model_name_or_path="https://evil.example/model"),
    config("a base that is itself", "", (SHOW, MODEL), base_model_name_or_path=EVIL, base_model_revision=None),
    config("a base that is a decomposition", "decomposition itself", (SHOW, MODEL), base_model_name_or_path=REPO,
           base_model_revision=None),
    config("a base with pickled weights", "", (SHOW, PUSH, MODEL), base_model_name_or_path="evil/pickled",
           base_model_revision=None, repos=PICKLED_REPO),
    config("a base that needs its own code", "", (SHOW, PUSH, MODEL), base_model_name_or_path="evil/code",
           base_model_revision=None, repos=CODE_REPO),
    config("a base with sizes of 10^8 and no weights", "", (SHOW, PUSH, MODEL), base_model_name_or_path="evil/huge",
           base_model_revision=None, repos=HUGE_REPO),
    config("a commit of the base that is none", "", (SHOW, MODEL), base_model_revision="../../main"),
    # Weights
    weights("half of the file", lambda good: good[: len(good) // 2], "no complete safetensors"),
    weights("empty", b"", "no complete safetensors"),
    weights("a header of 2^60 bytes", lambda good: struct.pack("<Q", 2**60) + good[8:], "no complete safetensors"),
    weights("a header of 99 MB that is not there", lambda good: struct.pack("<Q", 99 * MILLION) + good[8:], "no complete"),
    weights("a header that is no JSON", header(lambda head: b"}" * 64), "no complete safetensors"),
    weights("a header of 100,000 lists in each other", header(lambda head: nested(10**5)), "no complete safetensors"),
    weights("a weight twice in the header", header(twice), "no complete safetensors"),
    weights("overlapping weights", header(overlapping), "no complete safetensors"),
    weights("a weight beyond the end", entry(data_offsets=[10**6, 10**6 + 64]), "no complete safetensors"),
    weights("a negative shape", entry(shape=[-1]), "no complete safetensors"),
    weights("a shape of 10^12 without data", entry(shape=[10**12]), "no complete safetensors"),
    weights("a shape whose product overflows", entry(shape=[2**32, 2**32]), "no complete safetensors"),
    weights("an unknown dtype", entry(dtype="F99"), "no complete safetensors"),
    weights("whole numbers", tensors(lambda w: w.update({NAME: w[NAME].int()})), "dtype"),
    weights("another shape", tensors(lambda w: w.update({NAME: torch.zeros(3)})), "shape"),
    weights("a weight is missing", tensors(lambda w: w.pop(NAME)), "no weights named"),
    weights("a weight too many", tensors(lambda w: w.update({"layers.0.evil": torch.zeros(3)})), "not the decomposition"),
    weights("NaN", tensors(lambda w: w[NAME].fill_(float("nan"))), "not finite", (SHOW, EVALUATE, *DOORS)),
    weights("a pickle by another name", PICKLE, "no complete safetensors"),
    other("a pickle instead", {SHARD: None, "model-00002-of-00002.safetensors": None, INDEX: None,
                               "pytorch_model.bin": PICKLE}, harmless=(SHOW,), says=""),
    other("a shard is missing", {SHARD: None}, harmless=(SHOW,), says=""),
    other("pickles beside", {"pytorch_model.bin": PICKLE, "training_args.bin": PICKLE, "optimizer.pt": PICKLE,
                             "scaler.pkl": PICKLE}, harmless=READERS),
    # The index
    index("a file outside by ..", mapped_to("../../../etc/passwd.safetensors")),
    index("a file by its absolute path", mapped_to("/etc/passwd.safetensors")),
    index("a file of another repo", mapped_to("other/repo/model.safetensors")),
    index("a pickle", mapped_to("pytorch_model.bin"), **{"pytorch_model.bin": PICKLE}),
    index("a file that is no text", mapped_to(7)),
    index("a list", b"[]"),
    index("100,000 lists in each other", nested(10**5)),
    index("no weight_map", in_index(weight_map=None)),
    index("no metadata", in_index(metadata=None)),
    index("10^6 weights", in_index(weight_map={f"layers.{n}.x": SHARD for n in range(MILLION)})),
    index("not UTF-8", b"\xff\xfe"),
    # evaluation.json
    evaluation("100,000 lists in each other", nested(10**5), "no JSON"),
    evaluation("20 MB", b'{"a": "' + b"x" * 20_000_000 + b'"}', "larger than"),
    evaluation("a list", b"[]", "JSON object"),
    evaluation("not UTF-8", b"\xff", "no JSON"),
    evaluation("a number of 100,000 digits", b'{"kl": ' + b"9" * 10**5 + b"}", "no JSON"),
    evaluation("other types everywhere", json.dumps({"layers": 5, "cross_entropy": [], "settings": "x", "kl": {}}).encode(),
               harmless=(SHOW, PUSH, EVALUATE)),
    evaluation("NaN and infinities", b'{"layers": {"0": {"nmse": NaN, "fvu": Infinity}}, "kl": -Infinity}',
               harmless=(SHOW, PUSH, EVALUATE)),
    evaluation("numbers of 4,000 digits", json.dumps({"layers": {"0": {"nmse": 10**4000}}, "kl": 10**4000}).encode(),
               harmless=(SHOW, PUSH, EVALUATE)),
    evaluation("100,000 layers", json.dumps({"layers": {str(n): {} for n in range(10**5)}}).encode(),
               harmless=(SHOW, PUSH, EVALUATE)),
    evaluation("texts that steer, and are HTML and Jinja",
               json.dumps({"layers": {STEERING: {}}, "settings": {"dtype": STEERING, "training": {
                   "text": {"dataset": [STEERING, "{{ 7 * 7 }}", "<script>alert(1)</script>"]}, "device": "`$(touch x)`",
                   "loss": "<img src=x onerror=alert(1)>"}}}).encode(),
               harmless=(SHOW, PUSH, EVALUATE)),
    # The card of a repo that is listed, shown, and pushed over
    card("a tag that makes an object", "---\na: !!python/object/apply:os.system ['touch $MXD_CANARY']\n---\n", "no YAML"),
    card("a bomb of aliases", "---\na: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(9)) + "---\n", "aliases"),
    card("a bomb of merged keys", "---\na: &a {x: 1}\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)}\n  <<: [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(9)) + "---\n",
        "aliases"),
    card("100,000 lists in each other", b"---\na: " + nested(10**5) + b"\n---\n", "characters"),
    card("5,000 lists in each other", b"---\na: " + nested(5000) + b"\n---\n", "no YAML"),
    card("metadata of 1 MB", "---\ntags: [mxd]\na: " + "x" * MILLION + "\n---\n", "characters"),
    card("10 MB", "---\ntags: [mxd]\n---\n" + "x" * 10_000_000, "characters"),
    card("names of methods", "---\ntags: [mxd]\nto_dict: 5\nget: 1\n---\n", "no card can have"),
    card("names of arguments", "---\ntags: [mxd]\nignore_metadata_errors: true\nself: 1\n---\n", "no card can have"),
    card("keys that are no texts", "---\ntags: [mxd]\n1: 2\n---\n", "no card can have"),
    card("a list", "---\n- mxd\n---\n", "must be a mapping"),
    card("other types everywhere", "---\ntags: [mxd, 7, {a: b}]\nbase_model: {a: b}\nmxd: {layers: 7, num_experts: [1], "
         "method: {}, cross_entropy_rise: .nan}\nmodel-index: 5\n---\n", harmless=(SHOW, SEARCH, PUSH)),
    card("10^5 layers", "---\ntags: [mxd]\nmxd: {layers: [" + ",".join(map(str, range(10**4))) + "]}\n---\n",
         harmless=(SHOW, SEARCH, PUSH)),
    card("a model-index that is none", "---\ntags: [mxd]\nmodel-index: [{name: x, results: [5]}]\n---\n",
         harmless=(SHOW, SEARCH, PUSH)),
    card("texts that steer the terminal", "---\ntags: [mxd]\nbase_model: \"\\e]0;owned\\a\\e[2J\\u202E\\0\"\n---\n",
         harmless=(SHOW, SEARCH, PUSH)),
    card("a base model of 50,000 characters", "---\ntags: [mxd]\nbase_model: " + "x" * 50_000 + "\n---\n",
         harmless=(SHOW, SEARCH, PUSH)),
    card("markup in the name", "---\ntags: [mxd]\nbase_model: '[bold red]x[/] [link=https://evil.example]y[/link]'\n---\n",
         harmless=(SHOW, SEARCH, PUSH)),
    card("Jinja and HTML", "---\ntags: [mxd]\n---\n{{ 7 * 7 }} {% for x in range(10**9) %}x{% endfor %}\n<script>x</script>\n",
         harmless=(SHOW, SEARCH, PUSH)),
    card("30,000 marks", "---\ntags: [mxd]\n---\n" + "<!-- mxd: begin -->" * 30_000, harmless=(SHOW, SEARCH, PUSH)),
    card("not UTF-8", b"---\ntags: [mxd]\n---\n\xff\xfe\n", harmless=(SHOW, SEARCH, PUSH)),
    # Files of others' kinds
    other("an adapter that names another base", {"adapter_config.json": json.dumps(
        {"base_model_name_or_path": "evil/code", "peft_type": "LORA"}).encode()},
        ways=(SHOW, PUSH, EVALUATE, MODEL, LM), harmless=(SHOW, PUSH, EVALUATE), repos=CODE_REPO),
    other("an adapter_config of 100,000 lists", {"adapter_config.json": nested(10**5)},
          ways=(SHOW, PUSH, EVALUATE, MODEL, LM), harmless=(SHOW, PUSH, EVALUATE)),
    other("a hostile generation_config", {"generation_config.json": b'{"max_length": 1e400, "num_beams": -1}'},
          harmless=READERS),
    other("a tokenizer with code of its own", {"tokenizer_config.json": json.dumps(
        {"auto_map": {"AutoTokenizer": ["evil/code--evil.Evil", None]}}).encode()}, harmless=READERS, repos=CODE_REPO),
    other("a chat template that never ends", {"chat_template.jinja": b"{% for x in range(10**12) %}x{% endfor %}"},
          harmless=READERS),
]  # fmt: skip


class HostileScene(Scene):
    """A scene with a repo and a folder that hold a case, and a canary that hostile code would leave."""

    def __init__(self, hub, folder):
        super().__init__(hub, folder)
        self.place, self.canary = folder / "case", folder / "canary"
        os.environ["MXD_CANARY"] = str(self.canary)
        self.good = dict(hub.files(REPO))
        self.known = set(hub.repos)

    def set(self, case):
        """Put a case into the repo EVIL and into a folder."""
        for name in set(self.hub.repos) - self.known:
            del self.hub.repos[name]
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)
        self.canary.unlink(missing_ok=True)
        files = dict(self.good)
        for name, content in case.files.items():
            files[name] = content(self.good[name]) if callable(content) else content
        files = {name: content for name, content in files.items() if content is not None}
        for name, content in files.items():
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            (self.place / name).write_bytes(content)
        if case.group == "card":  # of the repo that is pushed over, not of the folder
            (self.place / "README.md").unlink()
            self.hub.create("user/out", {"README.md": files["README.md"]})
        self.hub.create(EVIL, files)
        for name, content in case.repos.items():
            self.hub.create(name, content)


RUNS = {
    SHOW: by_command("show", EVIL),
    SEARCH: by_command("search"),
    PUSH: by_command("push", "{place}", "user/out"),
    EVALUATE: by_command("evaluate", "{place}", "--tokens", "64", "--context-length", "16"),
    MODEL: by_door(AutoModel, False),
    LM: by_door(AutoModelForCausalLM, False),
    REMOTE: by_door(AutoModelForCausalLM, True),
    UNTRUSTED: by_door(AutoModelForCausalLM, False, registered=False),
}


@dataclass
class Result:
    """Outcome of a case by one way; `seconds`, and `bytes` by which the resident memory rose at most."""

    outcome: Outcome
    seconds: float
    bytes: int


def run(scene, case, way):
    scene.set(case)
    with _limited() as used:
        started = time.monotonic()
        outcome = RUNS[way](scene, EVIL)
        seconds = time.monotonic() - started
    if outcome.kind in (COMPLETE, REFUSED) and (wrong := _wrong(scene, case, way, outcome, seconds, used["bytes"])):
        outcome = Outcome(f"broken: {wrong}", outcome.message)
    return Result(outcome, seconds, used["bytes"])


def _wrong(scene, case, way, outcome, seconds, used):
    wrong = []
    if seconds > SECONDS:
        wrong.append(f"it took {seconds:.1f} s")
    if used > BYTES or "MemoryError" in outcome.message or "can't allocate memory" in outcome.message:
        wrong.append(f"it allocated {used / 2**20:.0f} MB")
    if scene.canary.exists() or "code was run" in outcome.message:
        wrong.append("its code was run")
    if way.startswith("mxd ") and any(not c.isprintable() and c not in "\n\r\t" for c in outcome.message):
        wrong.append("it steers the terminal")
    if way == SEARCH and REPO not in outcome.message.replace("\n", ""):
        wrong.append("others are not found")
    if way == PUSH and outcome.kind == REFUSED and len(getattr(scene.hub.repos.get("user/out"), "commits", [1])) > 1:
        wrong.append("it was pushed")
    if way == PUSH and outcome.kind == COMPLETE:
        pushed = scene.hub.files("user/out")
        if PICKLE in pushed.values() or CODE in pushed.values():
            wrong.append("code or pickles of a stranger were pushed on")
    if outcome.kind == REFUSED and way.startswith("mxd ") and case.says not in outcome.message:
        wrong.append(f"the message does not say {case.says!r}")
    return "; ".join(wrong)


@contextlib.contextmanager
def _limited():
    """At most `BYTES` more address space inside the block; gives what the resident memory rose by."""
    used = {"bytes": 0}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + BYTES, hard))
    try:
        yield used
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        used["bytes"] = max(0, _status("VmHWM") - before)


def _status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024

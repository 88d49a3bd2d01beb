"""What a stranger may put into a repo or a folder, as data.

A case changes some files of a good decomposition, and names the ways by which they are read: commands and AutoClasses.
"""

import json
import os
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save

REPO, EVIL = "user/pulled", "user/evil"
SHARD, OTHER_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NAME = "layers.0.output_bias"

# The ways in. The commands promise to run nothing and to trust nothing. `from_pretrained` protects memory and paths:
# whoever passes `trust_remote_code=True` runs the repo's code anyway.
SHOW, SEARCH, PUSH, EVALUATE = "mxd show", "mxd search", "mxd push", "mxd evaluate"
MODEL, LM = "AutoModel", "AutoModelForCausalLM"
COMMANDS = (SHOW, PUSH, EVALUATE)
READERS = (*COMMANDS, MODEL, LM)
LISTED = (SHOW, SEARCH, PUSH)


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


def config(name, says="", harmless=(), ways=COMMANDS, repos=None, **values):
    return Case("config", name, changed(**values), ways, harmless, says, repos or {})


def sizes(name, says, harmless=(), **values):
    return config(name, says, harmless, (*COMMANDS, MODEL), **values)


def base(name, harmless, says="", repos=None, **values):
    return config(name, says, harmless, READERS, repos, **values)


def raw(name, content, says="not valid JSON"):
    return Case("config", name, {"config.json": content}, COMMANDS, (), says)


def without_version(good):
    values = json.loads(good)
    del values["format_version"]
    return json.dumps(values).encode()


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


def index(name, build, ways=(PUSH, MODEL, LM), harmless=(), says="", **more):
    return Case("index", name, {INDEX: build, **more}, ways, harmless, says)


def in_index(**values):
    return lambda good: json.dumps({**json.loads(good), **values}).encode()


def mapped_to(file):
    def build(good):
        values = json.loads(good)
        values["weight_map"][NAME] = file
        return json.dumps(values).encode()

    return build


def evaluation(name, content, says="", harmless=(), ways=COMMANDS):
    return Case("evaluation.json", name, {"evaluation.json": content}, ways, harmless, says)


def card(name, text, says="", harmless=(SHOW, SEARCH), ways=LISTED):
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
    "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil"),
}
CODE_REPO = {"evil/code": {"config.json": json.dumps(CODE_CONFIG).encode(), "evil.py": CODE}}
ELSEWHERE = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil/code--evil.Evil")
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

# fmt: off
CASES = [
    # Sizes
    *(
        sizes(f"num_experts {name}", "num_experts", num_experts=value)
        for name, value in {"10^12": 10**12, "zero": 0, "NaN": float("nan"), "true": True, "a text": "24"}.items()
    ),
    raw(
        "num_experts of 100,000 digits",
        lambda good: good.replace(b'"num_experts": 24', b'"num_experts": ' + b"9" * 10**5),
    ),
    sizes("hidden_size 10^12", "hidden_size", hidden_size=10**12),
    sizes("K above N", "must not exceed", num_experts_per_tok=25),
    sizes(
        "all sizes 2^31 - 1", "this machine has", (SHOW,), num_experts=LARGE, hidden_size=LARGE, intermediate_size=LARGE
    ),
    sizes("other sizes than the weights'", "shape", (SHOW,), num_experts=23),
    sizes("vocab_size a text", "vocab_size", vocab_size="x" * 100),
    # Layers
    sizes("10^5 layers", "layers must be at most", layers=list(range(10**5))),
    sizes("a layer 10^12", "layers must be whole", layers=[10**12]),
    sizes("a negative layer", "layers must be whole", layers=[-1]),
    sizes("a layer twice", "more than once", layers=[0, 0]),
    sizes("layers of lists", "layers must be whole", layers=[[0]]),
    sizes("layers a text", "layers must be a list", layers="02"),
    sizes("no layers", "names no layers", layers=[]),
    sizes("1,000 layers, weights of two", "is missing", (SHOW,), layers=list(range(1000))),
    sizes("a layer that the base has not", "is missing", (SHOW,), layers=[0, 99]),
    sizes("10^4 layer_overrides", "layer_overrides", layer_overrides={str(n): {"site": n} for n in range(10**4)}),
    sizes("an override of 10^12", "layer 2: num_experts", layer_overrides={"2": {"num_experts": 10**12}}),
    sizes("an override of an unknown field", "unknown field", layer_overrides={"2": {"__class__": "x"}}),
    sizes("overrides that are no mapping", "layer_overrides must map", layer_overrides=[1]),
    # Texts
    config("an activation that is code", "hidden_act", hidden_act="__import__('os').system('touch $MXD_CANARY')"),
    config("an activation that is a mapping", "hidden_act", hidden_act={"a": 1}),
    config("a site that is no site", "site must be", site="../../etc"),
    config("a name of 5 MB", "base_model_name_or_path", base_model_name_or_path="x" * 5_000_000),
    config("a name that steers the terminal", "printable", base_model_name_or_path=f"user/{STEERING}"),
    config("a revision that steers the terminal", "printable", base_model_revision=STEERING),
    config("an unknown field of 20 MB", "larger than", extra="x" * 20_000_000),
    config("an unknown field that steers the terminal", "not a field", **{STEERING: STEERING}),
    # The file
    raw("100,000 lists in each other", nested(10**5)),
    raw("100,000 objects in each other", b'{"model_type": "mxd", "a": ' + nested(10**5, b'{"a":', b"}") + b"}"),
    raw("a list", b"[1, 2]", says="must hold a JSON object"),
    raw("empty", b""),
    raw("not UTF-8", b'{"model_type": "mxd\xff"}'),
    raw("not there", None, says="no config.json"),
    raw("another model's", json.dumps(LLAMA).encode(), says="no decomposition"),
    # What transformers takes from a config
    config("a name of one of its methods", "not a field", check_memory=None),
    config("a name of a property", "not a field", num_parameters=1),
    config("attribute_map", "not a field", attribute_map={"num_experts": "evil"}, evil=10**12),
    config("10^9 labels", "not a field", num_labels=10**9),
    config("a dtype that is a function", "dtype", dtype="load"),
    config("a torch_dtype that is none", "torch_dtype", torch_dtype="evil"),
    config("a quantisation", "not a field", quantization_config={"quant_method": "evil"}),
    config("weights elsewhere", "not a field", transformers_weights="../evil.safetensors"),
    # The format
    raw("no format_version", without_version, "before the first release"),
    config("a newer format with a field of its own", "newer", format_version=2, expert_colour="red"),
    config("a format that is a text", "format", format_version="1"),
    # Whose code
    config("code of another repo", ways=READERS, harmless=READERS, auto_map=ELSEWHERE, repos=CODE_REPO),
    other("the repo's own code is other code",
          {"modeling_mxd.py": CODE, "configuration_mxd.py": CODE, "layers.py": CODE, "torch.py": CODE},
          harmless=READERS),
    # The base model
    base("no base model", (SHOW, MODEL), base_model_name_or_path=None),
    base("a base that is a folder here", (SHOW, MODEL), base_model_name_or_path="/etc"),
    base("a base outside", (SHOW, MODEL), base_model_name_or_path="../../../etc/passwd"),
    base("a base that is itself", (SHOW, MODEL), base_model_name_or_path=EVIL, base_model_revision=None),
    base("a base that is a decomposition", (SHOW, MODEL), "decomposition itself", base_model_name_or_path=REPO,
         base_model_revision=None),
    base("a base with pickled weights", (SHOW, PUSH, MODEL), base_model_name_or_path="evil/pickled",
         base_model_revision=None, repos=PICKLED_REPO),
    base("a base that needs its own code", (SHOW, PUSH, MODEL), base_model_name_or_path="evil/code",
         base_model_revision=None, repos=CODE_REPO),
    base("a base with sizes of 10^8 and no weights", (SHOW, PUSH, MODEL), base_model_name_or_path="evil/huge",
         base_model_revision=None, repos=HUGE_REPO),
    base("a commit of the base that is none", (SHOW, MODEL), base_model_revision="../../main"),
    # Weights
    weights("half of the file", lambda good: good[: len(good) // 2], "no complete safetensors"),
    weights("empty", b"", "no complete safetensors"),
    weights("a header of 2^60 bytes", lambda good: struct.pack("<Q", 2**60) + good[8:], "no complete safetensors"),
    weights("a header of 99 MB that is not there", lambda good: struct.pack("<Q", 99 * MILLION) + good[8:],
            "no complete safetensors"),
    weights("a header that is no JSON", header(lambda head: b"}" * 64), "no complete safetensors"),
    weights("a header of 100,000 lists in each other", header(lambda head: nested(10**5)), "no complete safetensors"),
    weights("overlapping weights", header(overlapping), "no complete safetensors"),
    weights("a weight beyond the end", entry(data_offsets=[10**6, 10**6 + 64]), "no complete safetensors"),
    weights("a negative shape", entry(shape=[-1]), "no complete safetensors"),
    weights("a shape of 10^12 without data", entry(shape=[10**12]), "no complete safetensors"),
    weights("a shape whose product overflows", entry(shape=[2**32, 2**32]), "no complete safetensors"),
    weights("an unknown dtype", entry(dtype="F99"), "no complete safetensors"),
    weights("whole numbers", tensors(lambda w: w.update({NAME: w[NAME].int()})), "dtype"),
    weights("another shape", tensors(lambda w: w.update({NAME: torch.zeros(3)})), "shape"),
    weights("a weight is missing", tensors(lambda w: w.pop(NAME)), "is missing"),
    weights("a weight too many", tensors(lambda w: w.update({"layers.0.evil": torch.zeros(3)})),
            "not the decomposition's"),
    weights("NaN", tensors(lambda w: w[NAME].fill_(float("nan"))), "not finite", (SHOW, MODEL, LM)),
    weights("a pickle by another name", PICKLE, "no complete safetensors"),
    other("a pickle instead", {SHARD: None, OTHER_SHARD: None, INDEX: None,
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
    index("40,000 weights", in_index(weight_map={f"layers.{n}.x": SHARD for n in range(40_000)})),
    index("not UTF-8", b"\xff\xfe"),
    # evaluation.json
    evaluation("100,000 lists in each other", nested(10**5), "not valid JSON"),
    evaluation("20 MB", b'{"a": "' + b"x" * 20_000_000 + b'"}', "larger than"),
    evaluation("a list", b"[]", "JSON object"),
    evaluation("a figure twice", b'{"kl": 0.1, "kl": 9}', "names 'kl' twice"),
    evaluation("not UTF-8", b"\xff", "not valid JSON"),
    evaluation("a number of 100,000 digits", b'{"kl": ' + b"9" * 10**5 + b"}", "not valid JSON"),
    evaluation("other types everywhere", b'{"layers": 5, "cross_entropy": [], "settings": "x", "kl": {}}',
               harmless=COMMANDS),
    evaluation("NaN and infinities", b'{"layers": {"0": {"nmse": NaN, "fvu": Infinity}}, "kl": -Infinity}',
               harmless=COMMANDS),
    evaluation("numbers of 4,000 digits", json.dumps({"layers": {"0": {"nmse": 10**4000}}, "kl": 10**4000}).encode(),
               harmless=COMMANDS),
    evaluation("10,000 layers", json.dumps({"layers": {str(n): {} for n in range(10**4)}}).encode(),
               harmless=COMMANDS),
    evaluation("texts that steer, and are HTML and Jinja",
               json.dumps({"layers": {STEERING: {}}, "settings": {"dtype": STEERING, "training": {
                   "text": {"dataset": [STEERING, "{{ 7 * 7 }}", "<script>alert(1)</script>"]},
                   "device": "`$(touch x)`", "loss": "<img src=x onerror=alert(1)>"}}}).encode(),
               harmless=COMMANDS),
    # The card of a repo that is listed, shown, and pushed over
    card("a tag that makes an object", "---\na: !!python/object/apply:os.system ['touch $MXD_CANARY']\n---\n",
         "no YAML"),
    card("a bomb of aliases", "---\na: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(9)) + "---\n",
        "aliases"),
    card("a bomb of merged keys", "---\na: &a {x: 1}\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)}\n  <<: [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(9)) + "---\n",
        "aliases"),
    card("100,000 lists in each other", b"---\na: " + nested(10**5) + b"\n---\n", "characters"),
    card("2,000 lists in each other", b"---\na: " + nested(2000) + b"\n---\n", "no YAML"),
    card("metadata of 1 MB", "---\ntags: [mxd]\na: " + "x" * MILLION + "\n---\n", "characters"),
    card("10 MB", "---\ntags: [mxd]\n---\n" + "x" * 10_000_000, "characters"),
    card("names of methods", "---\ntags: [mxd]\nto_dict: 5\nget: 1\n---\n", "no card can have"),
    card("names of arguments", "---\ntags: [mxd]\nignore_metadata_errors: true\nself: 1\n---\n", "no card can have"),
    card("keys that are no texts", "---\ntags: [mxd]\n1: 2\n---\n", "no card can have"),
    card("a list", "---\n- mxd\n---\n", "must be a mapping"),
    card("other types everywhere", "---\ntags: [mxd, 7, {a: b}]\nbase_model: {a: b}\n"
         "mxd: {layers: 7, num_experts: [1], method: {}, cross_entropy_rise: .nan}\nmodel-index: 5\n---\n",
         harmless=LISTED),
    card("2,000 layers", "---\ntags: [mxd]\nmxd: {layers: [" + ",".join(map(str, range(2000))) + "]}\n---\n",
         harmless=LISTED),
    card("a model-index that is none", "---\ntags: [mxd]\nmodel-index: [{name: x, results: [5]}]\n---\n",
         harmless=LISTED),
    card("texts that steer the terminal", "---\ntags: [mxd]\nbase_model: \"\\e]0;owned\\a\\e[2J\\u202E\\0\"\n---\n",
         harmless=LISTED),
    card("a base model of 50,000 characters", "---\ntags: [mxd]\nbase_model: " + "x" * 50_000 + "\n---\n",
         harmless=LISTED),
    card("markup in the name", "---\ntags: [mxd]\nbase_model: '[red]x[/] [link=https://evil.example]y[/link]'\n---\n",
         harmless=LISTED),
    card("Jinja and HTML",
         "---\ntags: [mxd]\n---\n{{ 7 * 7 }} {% for x in range(10**9) %}x{% endfor %}\n<script>x</script>\n",
         harmless=LISTED),
    card("30,000 marks", "---\ntags: [mxd]\n---\n" + "<!-- mxd: begin -->" * 30_000, harmless=LISTED),
    card("not UTF-8", b"---\ntags: [mxd]\n---\n\xff\xfe\n", harmless=LISTED),
    # Files of others' kinds
    other("an adapter that names another base", {"adapter_config.json": json.dumps(
        {"base_model_name_or_path": "evil/code", "peft_type": "LORA"}).encode()},
        harmless=(SHOW, PUSH), repos=CODE_REPO),
    other("an adapter_config of 100,000 lists", {"adapter_config.json": nested(10**5)},
          harmless=(SHOW, PUSH)),
    other("a hostile generation_config", {"generation_config.json": b'{"max_length": 1e400, "num_beams": -1}'},
          harmless=READERS),
    other("a tokenizer with code of its own", {"tokenizer_config.json": json.dumps(
        {"auto_map": {"AutoTokenizer": ["evil/code--evil.Evil", None]}}).encode()}, harmless=READERS, repos=CODE_REPO),
    other("a chat template that never ends", {"chat_template.jinja": b"{% for x in range(10**12) %}x{% endfor %}"},
          harmless=READERS),
]
# fmt: on

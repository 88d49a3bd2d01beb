"""`push_to_hub`: what both doors need, in one commit.

Where the library mxd is installed, its `push_decomposition` does it, with the card that shows the results. Elsewhere
(this file travels with every repo) the client of the Hub does it here, with a card of what the config alone knows.
"""

import json
import re
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from transformers import AutoTokenizer
from transformers.utils import logging

from .configuration_mxd import DEMO_MODEL, MxDConfig
from .loading import is_causal

logger = logging.get_logger(__name__)

# What lies between these marks of a card is ours: a later push replaces it.
BEGIN, END = "<!-- mxd: begin -->", "<!-- mxd: end -->"
# What an earlier push left and a later one has not would be loaded along with it.
REPLACED = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|evaluation\.json")
MAX_ID = 200
# That loads a pushed repo; benchmarks/compatibility.py shows it.
OLDEST_TRANSFORMERS = "4.56"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

_CARD = """---
library_name: mxd
{pipeline}base_model: {base}
base_model_relation: adapter
tags:
{tags}
mxd:
  layers: {layers}
  method: {method}
  num_experts: {experts}
  num_experts_per_tok: {k}
---

{begin}
# Sparse stand-ins for MLPs of {base}

Layers {layers}: {experts} experts each, of which at most {k} are active per token. The method is that of
[arXiv 2505.21364](https://arxiv.org/abs/2505.21364).

```python
{imports}

decomposition = AutoModel.from_pretrained("{repo}", trust_remote_code=True)  # the sparse layers alone
{spliced}
```

How faithful it is, is not recorded. Only the MLPs of these layers are replaced; the weights of the base model are not
in this repo, and its biases and terms of use are inherited.
{end}
"""


_SPLICED = (
    'model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)  # the base with them spliced in'
)
_IN_CLASS_OF_BASE = """with decomposition.spliced(model):  # the base, loaded with its own class
    ..."""


def push_to_hub(
    model: Any,
    config: MxDConfig,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Save a model of ours, with a tokenizer, and push it; arguments as for transformers' `push_to_hub`.

    Args:
        model: whose `save_pretrained` writes a decomposition.
        config: of the decomposition.

    Raises:
        ValueError: the config names no base model that others can load.
        HfHubHTTPError: the Hub refuses (`hub_cards.HubError` where the library is installed); the repo is then as it
            was before.
    """
    check_base_id(config.base_model_name_or_path)
    if config._name_or_path and (Path(config._name_or_path) / "evaluation.json").is_file():
        logger.warning(
            f"{config._name_or_path} has an evaluation.json, which is not pushed, since the weights may be others by "
            "now: `mxd push` shares a folder as it is"
        )
    how: dict[str, Any] = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        push = next((entry.load() for entry in entry_points(group="mxd.push")), _push_folder)
        return push(folder, repo_id, message=commit_message, description=commit_description, tags=tags, **how)


def check_base_id(name: str | None) -> None:
    """Refuse what is no Hub id.

    Raises:
        ValueError: saying what to do.
    """
    if not name:
        raise ValueError("the config names no base model: set config.base_model_name_or_path to its Hub id")
    if name == DEMO_MODEL:
        raise ValueError("the base model ships with the library mxd and is on no Hub: share one of another model")
    if len(name) > MAX_ID or not HUB_ID.fullmatch(name) or Path(name).is_dir():
        raise ValueError(
            f"the base model {name[:200]!r} is no Hub id, so nobody else can load the decomposition: set "
            "config.base_model_name_or_path to the Hub id of the same model"
        )


def save_tokenizer(base: str | None, revision: str | None, folder: str, token: bool | str | None) -> None:
    """Save a base model's tokenizer into a folder, so that pipelines find it beside the decomposition.

    Raises:
        OSError, ValueError: it has none, or one that needs code of its own.
    """
    AutoTokenizer.from_pretrained(base, revision=revision, token=token, trust_remote_code=False).save_pretrained(folder)
    settings = Path(folder) / "tokenizer_config.json"
    settings.write_bytes(with_known_class(settings.read_bytes()))


def with_known_class(tokenizer_config: bytes) -> bytes:
    """A tokenizer_config.json whose class transformers 4 knows too: 5 writes another name of the same class, which 4
    refuses."""
    return re.sub(rb'("tokenizer_class"\s*:\s*)"TokenizersBackend"', rb'\1"PreTrainedTokenizerFast"', tokenizer_config)


def _push_folder(
    folder: str,
    repo_id: str,
    message: str | None,
    description: str | None,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
    tags: list[str] | None,
) -> CommitInfo:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    earlier = {file.rfilename for file in info.siblings or []}
    config = MxDConfig.from_pretrained(folder)
    if "tokenizer_config.json" not in earlier:
        try:
            save_tokenizer(config.base_model_name_or_path, config.base_model_revision, folder, token)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            logger.warning(f"pushed without a tokenizer, the base model's cannot be loaded: {error}")
    content: dict[str, Any] = {path.name: path for path in sorted(Path(folder).iterdir()) if path.is_file()}
    card = _card(config, repo_id, tags or [])
    if "README.md" in earlier:
        path = hf_hub_download(repo_id, "README.md", revision=info.sha, token=token)
        card = _over(Path(path).read_text(encoding="utf-8"), card)
    content["README.md"] = card.encode()
    operations: list[Any] = [CommitOperationAdd(name, data) for name, data in content.items()]
    stale = sorted(name for name in earlier if REPLACED.fullmatch(name) and name not in content)
    return api.create_commit(
        repo_id,
        operations + [CommitOperationDelete(name) for name in stale],
        commit_message=message or "Upload decomposition",
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=info.sha,
    )


def _card(config: MxDConfig, repo_id: str, tags: list[str]) -> str:
    first, causal = config.layer(config.layers[0]), is_causal(config.base_model_type)
    tags = ["mxd", "interpretability", *(f"mxd-layer-{layer}" for layer in config.layers), *tags]
    return _CARD.format(
        repo=repo_id,
        pipeline="pipeline_tag: text-generation\n" if causal else "",
        imports="from transformers import AutoModel" + (", AutoModelForCausalLM" if causal else ""),
        spliced=(_SPLICED if causal else _IN_CLASS_OF_BASE).format(repo=repo_id),
        base=config.base_model_name_or_path,
        tags="\n".join(f"- {json.dumps(tag)}" for tag in tags),
        layers=config.layers,
        method=first.method,
        experts=first.num_experts,
        k=first.num_experts_per_tok,
        begin=BEGIN,
        end=END,
    )


def _over(earlier: str, card: str) -> str:
    """An earlier card whose generated part, and metadata of results, are no longer true of what is pushed."""
    old, new = ModelCard(earlier), ModelCard(card)
    for name in ("eval_results", "library_name", "pipeline_tag", "base_model", "base_model_relation", "mxd"):
        old.data[name] = new.data.get(name)
    tags = old.data.get("tags")
    tags = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    tags = [tag for tag in tags if tag not in new.data["tags"] and not re.fullmatch(r"mxd-layer-\d+", tag)]
    old.data["tags"] = tags + new.data["tags"]
    block = new.text[new.text.index(BEGIN) :].rstrip()
    generated = re.search(f"{BEGIN}.*?{END}", old.text, re.DOTALL)
    text = old.text.replace(generated.group(), block, 1) if generated else f"{old.text.rstrip()}\n\n{block}\n"
    return f"---\n{old.data.to_yaml()}\n---\n{text}"

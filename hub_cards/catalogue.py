"""Find decompositions that others share, from cards and small JSON files: no weights are downloaded, no code is run."""

from collections.abc import Iterator
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download

from mxd.modeling_mxd import MxDConfig

from .hub import HubRepo, get_repo, search, with_retries
from .reading import MAX_FILE_BYTES, read_config, read_json
from .safe_text import finite_number, get_nested, strings_in


class DecompositionInfo(NamedTuple):
    """What the card of a repo says about its decomposition; None where it does not. N and K are the first layer's."""

    repo_id: str
    base_model: str | None
    layers: list[int]
    method: str | None
    """`"mxd"`, `"transcoder"` or `"skip_transcoder"`"""
    num_experts: int | None
    num_experts_per_tok: int | None
    cross_entropy_rise: float | None
    """spliced − untouched, in nats per token"""
    likes: int
    last_modified: datetime | None


class DecompositionDetails(NamedTuple):
    """The card's information, and the repo's files as far as they are small."""

    info: DecompositionInfo
    config: MxDConfig
    evaluation: dict[str, Any] | None
    commit: str
    weight_bytes: int


def list_decompositions(
    query: str | None = None,
    *,
    base_model: str | None = None,
    layer: int | None = None,
    author: str | None = None,
    limit: int | None = None,
    token: str | bool | None = None,
) -> Iterator[DecompositionInfo]:
    """Yield decompositions on the Hub, the most recently changed first; pages are only asked for when needed.

    Args:
        query: text in the name of the repo or of its base model, in any case.
        base_model: exact Hub id of the base model.
        layer: a layer that is decomposed.
        author: user or organisation.
        limit: maximal number of results.
        token: token of the Hub.

    Raises:
        HubError: the Hub cannot be asked.
    """
    filters = ["mxd"]
    filters += [] if base_model is None else [f"base_model:{base_model}"]
    filters += [] if layer is None else [f"mxd-layer-{layer}"]
    parameters = {"filter": filters, "author": author, "sort": "lastModified", "full": True, "cardData": True}
    repos = search({name: value for name, value in parameters.items() if value is not None}, token)
    wanted = (query or "").lower()
    found = (info for info in map(_info, repos) if wanted in f"{info.repo_id}\n{info.base_model or ''}".lower())
    return islice(found, limit)


def _info(repo: HubRepo) -> DecompositionInfo:
    get = partial(get_nested, repo.card, "mxd")  # each value may have any type
    layers = get("layers")
    return DecompositionInfo(
        repo_id=repo.repo_id,
        base_model=next(iter(strings_in(repo.card.get("base_model"))), None),
        layers=[layer for layer in layers if _whole(layer) is not None] if isinstance(layers, list) else [],
        method=next(iter(strings_in(get("method"))), None),
        num_experts=_whole(get("num_experts")),
        num_experts_per_tok=_whole(get("num_experts_per_tok")),
        cross_entropy_rise=finite_number(get("cross_entropy_rise")),
        likes=repo.likes,
        last_modified=repo.last_modified,
    )


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def show_decomposition(
    repo_id: str, *, revision: str | None = None, token: str | bool | None = None
) -> DecompositionDetails:
    """Return the config, the results and the size of a decomposition on the Hub.

    Raises:
        HubError: the repo does not exist, or the Hub cannot be asked.
        ValueError: it holds no decomposition, or one that this version refuses.
    """
    repo = with_retries(partial(get_repo, repo_id, revision, token), f"looking up {repo_id}")

    def fetch(name: str) -> Path:
        if repo.files[name] > MAX_FILE_BYTES:
            raise ValueError(f"{name} of {repo_id} is larger than {MAX_FILE_BYTES:,} bytes: it is not read")
        get = partial(hf_hub_download, repo_id, name, revision=repo.commit, token=token)
        return Path(with_retries(get, f"reading {repo_id}"))

    if "config.json" not in repo.files:
        raise ValueError(f"{repo_id} holds no decomposition: there is no config.json in it")
    return DecompositionDetails(
        info=_info(repo),
        config=read_config(fetch("config.json"), repo_id),
        evaluation=read_json(fetch("evaluation.json")) if "evaluation.json" in repo.files else None,
        commit=repo.commit,
        weight_bytes=sum(size for name, size in repo.files.items() if name.endswith(".safetensors")),
    )

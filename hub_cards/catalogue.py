"""Finding decompositions that others share. Reads cards' metadata and small JSON files: no weights are downloaded, and
no code of a repo is run."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from mxd.modeling_mxd import MxDConfig

from .hub import HubRepo, look_up, search, with_retries
from .reading import MAX_JSON_BYTES, read_config, read_json
from .safe_text import finite

LIBRARY = "mxd"


@dataclass(frozen=True)
class DecompositionInfo:
    """What a repo's card says of its decomposition; None where it doesn't.

    Attributes:
        repo_id: on the Hub.
        base_model: Hub id.
        layers: decomposed layers.
        method: `"mxd"`, `"transcoder"` or `"skip_transcoder"`.
        num_experts, num_experts_per_tok: N and K of the first layer.
        cross_entropy_rise: nats per token, spliced − untouched.
        likes: on the Hub.
        last_modified: of the repo.
    """

    repo_id: str
    base_model: str | None
    layers: list[int]
    method: str | None
    num_experts: int | None
    num_experts_per_tok: int | None
    cross_entropy_rise: float | None
    likes: int
    last_modified: datetime | None


@dataclass(frozen=True)
class DecompositionDetails:
    """What `show_decomposition` found.

    Attributes:
        info: what the list shows.
        config: of the decomposition.
        evaluation: evaluation.json, or None.
        commit: of the repo.
        weight_bytes: size of the weights.
        private: whether the repo is.
    """

    info: DecompositionInfo
    config: MxDConfig
    evaluation: dict[str, Any] | None
    commit: str
    weight_bytes: int
    private: bool
    files: list[str] = field(default_factory=list)


def list_decompositions(
    query: str | None = None,
    *,
    base_model: str | None = None,
    layer: int | None = None,
    author: str | None = None,
    limit: int | None = None,
    token: str | bool | None = None,
) -> Iterator[DecompositionInfo]:
    """Decompositions on the Hub, the most recently changed first, page by page as they are asked for.

    Args:
        query: text that the name of the repo or of its base model contains, in any case.
        base_model: exact Hub id of the base model.
        layer: only those that have this layer.
        author: user or organisation.
        limit: at most so many.
        token: of the Hub.

    Raises:
        HubError: the Hub cannot be asked.
    """
    filters = [LIBRARY]
    if base_model is not None:
        filters.append(f"base_model:{base_model}")
    if layer is not None:
        filters.append(f"mxd-layer-{layer}")
    parameters = {"filter": filters, "author": author, "sort": "lastModified", "full": True, "cardData": True}
    models = search({name: value for name, value in parameters.items() if value is not None}, token)
    found = (info for info in map(_info, models) if query is None or _matches(info, query))
    return islice(found, limit)


def _matches(info: DecompositionInfo, query: str) -> bool:
    return query.lower() in f"{info.repo_id}\n{info.base_model or ''}".lower()


def _info(model: HubRepo) -> DecompositionInfo:
    # Written by strangers: anything may be of any type.
    own = model.card.get("mxd")
    own = own if isinstance(own, dict) else {}
    layers = own.get("layers")
    base = model.card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    method = own.get("method")
    return DecompositionInfo(
        repo_id=model.repo_id,
        base_model=base if isinstance(base, str) else None,
        layers=[layer for layer in layers if _whole(layer) is not None] if isinstance(layers, list) else [],
        method=method if isinstance(method, str) else None,
        num_experts=_whole(own.get("num_experts")),
        num_experts_per_tok=_whole(own.get("num_experts_per_tok")),
        cross_entropy_rise=finite(own.get("cross_entropy_rise")),
        likes=model.likes,
        last_modified=model.last_modified,
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def show_decomposition(
    repo_id: str, *, revision: str | None = None, token: str | bool | None = None
) -> DecompositionDetails:
    """Configuration, results and size of a decomposition on the Hub.

    Raises:
        HubError: the repo cannot be had.
        ValueError: it holds no decomposition, or its config is nonsense.
    """
    model = look_up(repo_id, f"looking up {repo_id}", revision, token)

    def read(name: str) -> Path:
        if model.files.get(name, 0) > MAX_JSON_BYTES:
            raise ValueError(f"{name} of {repo_id} is larger than {MAX_JSON_BYTES:,} bytes: it is not read")
        return Path(
            with_retries(
                lambda: hf_hub_download(repo_id, name, revision=model.commit, token=token), f"reading {repo_id}"
            )
        )

    if "config.json" not in model.files:
        raise ValueError(f"{repo_id} holds no decomposition: there is no config.json in it")
    config = read_config(read("config.json"), repo_id)
    assert model.commit
    return DecompositionDetails(
        info=_info(model),
        config=config,
        evaluation=read_json(read("evaluation.json")) if "evaluation.json" in model.files else None,
        commit=model.commit,
        weight_bytes=sum(size for name, size in model.files.items() if name.endswith(".safetensors")),
        private=model.private,
        files=sorted(model.files),
    )

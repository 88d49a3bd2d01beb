"""Write the explorer as a folder that any static host serves, or as a Space on the Hugging Face Hub."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from mxd.base.files import json_line
from mxd.hub_cards.hub import with_retries

from .server import STATIC
from .site import ExplorerSite


def export_site(site: ExplorerSite, folder: Path) -> Iterator[str]:
    """Write the page and all of its data into a new or empty folder; yield the path of each file of data.

    Raises:
        ValueError: the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: name a new one with --export")
    folder.mkdir(parents=True, exist_ok=True)
    for file in STATIC.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for path in site.paths():
        target = folder / "data" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(json_line(site.value(path)))
        yield path


def push_space(folder: Path, space: str, title: str, decomposition: str | None = None) -> str:
    """Push an exported site as a static Space, in one commit, and return its address.

    Args:
        folder: as `export_site` writes it.
        space: `user/name`; the Space is created if it does not exist, public or private as the account's default is.
        title: shown on the Space's card.
        decomposition: Hub id, which the card links to.

    Raises:
        HubError: the Hub cannot be reached or refuses.
    """
    card = {"title": title[:60], "sdk": "static", "app_file": "index.html", "pinned": False, "tags": ["mxd"]}
    if decomposition is not None:
        card["models"] = [decomposition]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n", encoding="utf-8")
    api = HfApi()
    create = partial(api.create_repo, space, repo_type="space", space_sdk="static", exist_ok=True)
    space = with_retries(create, f"creating the Space {space}").repo_id
    upload = partial(
        api.upload_folder,
        repo_id=space,
        repo_type="space",
        folder_path=folder,
        delete_patterns="data/*",
        commit_message="Upload explorer",
    )
    with_retries(upload, f"pushing to the Space {space}")
    return f"{api.endpoint}/spaces/{space}"

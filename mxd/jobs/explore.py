"""`mxd explore`: a page on which to search, read and steer experts, on this machine or exported."""

import tempfile
from pathlib import Path

from mxd.base.base_model import load_tokenizer
from mxd.base.progress import progress_bar
from mxd.experts.collection_file import EXPERTS_NAME, load_collection
from mxd.explorer.publish import export_site, push_space
from mxd.explorer.server import ExplorerServer
from mxd.explorer.site import CHUNK, ExplorerSite
from mxd.hub_cards.reading import read_config
from mxd.hub_cards.safe_text import HUB_ID, is_hub_id, one_line, strings_in, without_folders

from .decompositions import recorded_evaluation, source_file, warn_of_weak_experts
from .options import text_name
from .playground import Playground
from .use_options import ExploreOptions


def explore(options: ExploreOptions, progress: bool = True) -> ExplorerServer | str:
    """Return the explorer's server, for `serve_forever`, or export the explorer and return the folder or address.

    Raises:
        ValueError: there is no such decomposition, its experts are not collected, or the output cannot be written.
    """
    if options.export is None and options.space is None:
        site = explorer_site(options.decomposition, api=True)
        playground = Playground(options.decomposition, site)
        try:
            server = ExplorerServer(site.value, playground.calls, options.port)
        except (OSError, OverflowError) as error:
            raise ValueError(f"port {options.port} is not free: choose another with --port ({error})") from error
        playground.load()
        return server
    if options.space is not None and ("/" not in options.space or not HUB_ID.fullmatch(options.space)):
        raise ValueError(f"{options.space!r} is no name of a Space: write user/name")
    site = explorer_site(options.decomposition, chunk=CHUNK)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.export or f"{temporary}/site")
        for _ in progress_bar(export_site(site, folder), desc="export", show=progress, unit="file"):
            pass
        if options.space is None:
            return str(folder)
        repo = options.decomposition if is_hub_id(options.decomposition) else None
        return push_space(folder, options.space, site.about["name"], repo)


def explorer_site(name: str, api: bool = False, chunk: int = 1) -> ExplorerSite:
    """Read what the explorer shows of a decomposition, without its weights. Arguments are those of `ExplorerSite`.

    Raises:
        ValueError: there is no such decomposition, or its experts have not been collected.
    """
    path, experts = source_file(name, "config.json"), source_file(name, EXPERTS_NAME)
    if path is None:
        raise ValueError(f"{name!r} is neither a folder with a decomposition nor a repo of one on the Hub")
    config = read_config(path, name)
    if experts is None:
        raise ValueError(f"{name} has no {EXPERTS_NAME}: `mxd experts FOLDER` makes it, in a folder of this machine")
    collection = load_collection(experts)
    for layer, one in collection.layers.items():
        if layer not in config.layers or len(one.frequency) != config.layer(layer).num_experts:
            raise ValueError(
                f"{EXPERTS_NAME} of {name} is of another decomposition: `mxd experts FOLDER` makes it anew"
            )
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"config.json of {name} names no base model (base_model_name_or_path)")
    methods = dict.fromkeys(config.layer(layer).method.replace("_", " ") for layer in collection.layers)
    texts = without_folders(strings_in(collection.settings.get("dataset")), "dataset")
    tokens = max(one.tokens for one in collection.layers.values())
    about = {
        "name": one_line(Path(name).resolve().name if Path(name).is_dir() else name),
        "about": one_line(
            f"{', '.join(methods)} of {without_folders(base, 'model')}; {tokens:,} tokens of {text_name(texts)}"
        ),
        "warning": warn_of_weak_experts(recorded_evaluation(name)),
    }
    tokenizer = load_tokenizer(base, config.base_model_revision, pickles=False)
    return ExplorerSite(collection, tokenizer, about, api, chunk)

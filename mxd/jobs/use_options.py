"""Options of the commands that use a decomposition's experts; see `options`."""

from dataclasses import dataclass

from .options import OUTPUT, option


@dataclass(kw_only=True)
class ExploreOptions:
    """Show a page on which to search, read and steer experts; `mxd experts` collects what it shows.

    The page is served to this machine until Ctrl-C, or else exported.
    """

    decomposition: str = option(..., "Folder or Hub id (user/repo[@revision]) of a decomposition.", argument="FOLDER")
    port: int = option(7860, "Port on 127.0.0.1; 0 takes one that is free.", minimum=0)
    export: str | None = option(None, "Instead: write the page into this new folder, for any static host.", OUTPUT)
    space: str | None = option(None, "Instead: push the page as a static Space, user/name, with its texts.", OUTPUT)

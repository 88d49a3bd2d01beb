"""Pushes of the Trainer to the Hub (`push_to_hub=True`): one commit each, complete with our card and code."""

import json
import logging
import os
import shlex
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from mxd.hub_cards import HubError, build_card, check_base_id, push_decomposition, update_card
from mxd.hub_cards.hub import with_retries
from mxd.hub_cards.safe_text import without_folders
from mxd.modeling_mxd import MxDModel

from .atomic_checkpoints import AtomicCheckpoints
from .decomposition_arguments import DecompositionArguments

logger = logging.getLogger(__name__)

_STAGED = "_push-"
_NAMING_FOLDERS = ("config.json", "trainer_state.json", "training_arguments.json")
_OPTIONS = ("license", "tags", "create_pr")


class HubPushes(AtomicCheckpoints):
    """A Trainer that pushes with `push_decomposition`: one commit, which can be repeated safely.

    During training, pushes run in a thread, from links to a checkpoint's files. If one fails, a warning is logged, and
    the next carries its content. A strategy that pushes checkpoints also pushes the optimiser's state, which is
    pickled; nothing of ours reads it from the Hub.
    """

    args: DecompositionArguments
    decomposition: MxDModel
    hub_model_id: str | None
    push_in_progress: PushInProgress | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repo; a HubError if the Hub refuses, a ValueError if the base model is a local folder."""
        if not self.is_world_process_zero():
            return
        config, given = self.decomposition.config, self.args.hub_base_model
        check_base_id(given or config.base_model_name_or_path, None if given else config.base_model_revision)
        output = Path(str(self.args.output_dir))
        for left in output.glob(f"{_STAGED}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        name = self.args.hub_model_id or output.absolute().name
        private = self.args.hub_private_repo if private is None else private
        api = HfApi(token=token or self.args.hub_token)
        repo = with_retries(lambda: api.create_repo(name, private=private, exist_ok=True), f"making the repo {name}")
        self.hub_model_id, self.push_in_progress = repo.repo_id, None

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write our card; what a person wrote into an earlier one is kept."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        card = build_card(folder, repo_id=self.hub_model_id, base_model=self.args.hub_base_model)
        path = folder / "README.md"
        if path.is_file():
            card = update_card(path.read_text(encoding="utf-8"), card)
        card.save(path)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save into `output_dir` and push it, after the pushes that are in progress.

        Args:
            blocking: Wait for the commit; otherwise a future is returned.
            token, revision, private: Override the arguments'.
            **kwargs: `license`, `tags`, `create_pr`, as for `push_decomposition`; others are ignored.

        Raises:
            HubError: The Hub refuses; the repo is then as it was, and the folder is kept.
            ValueError: A weight is not finite.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
        options |= {"message": commit_message, "token": token, "revision": revision}
        if blocking:
            return self._push_output(**options)
        pushed = self._pusher.submit(self._push_output, **options)
        self.push_in_progress = PushInProgress([pushed])
        return pushed

    def _push(self, folder: Path, token: str | None = None, revision: str | None = None, **options: Any) -> CommitInfo:
        assert self.hub_model_id
        options |= {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        return push_decomposition(folder, self.hub_model_id, base_model=self.args.hub_base_model, **options)

    def _push_output(self, **options: Any) -> CommitInfo:
        folder, base = str(self.args.output_dir), self.args.hub_base_model
        revision = options["revision"] or self.args.hub_revision
        try:
            return self._push(Path(folder), **options)
        except HubError as error:
            command = f"mxd push {shlex.quote(folder)} {self.hub_model_id}"
            command += f" --base-model {base}" if base else ""
            command += f" --revision {revision}" if revision else ""
            raise HubError(f"{error}\nIt is kept in {folder}; to push it later: {command}") from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy, current = self.args.hub_strategy, self.push_in_progress
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        in_progress = [] if current is None or current.is_done() else current.jobs
        if in_progress and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint, step = Path(checkpoint_folder), self.state.global_step
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=self.args.output_dir))
        shutil.copytree(checkpoint, staged, copy_function=_link, dirs_exist_ok=True)
        where = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}.get(strategy)
        also = {} if where is None else {f"{where}/{name}": _public(path) for name, path in _files(staged).items()}
        if self.processing_class is not None:
            self.processing_class.save_pretrained(staged)

        def push() -> None:
            try:
                self._push(staged, also=also, message=f"Training in progress, step {step}")
            except Exception as error:  # of any kind: the training must go on
                logger.warning("step %d was not pushed, the training goes on: %s", step, error)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        self.push_in_progress = PushInProgress([*in_progress, self._pusher.submit(push)])

    @cached_property
    def _pusher(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="push")  # one thread, so that pushes keep their order


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _link(source: str, target: str) -> None:
    """Link a file of a checkpoint, which may be deleted before it is pushed."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _public(path: Path) -> bytes | Path:
    """Return a file of a checkpoint without this machine's folders."""
    if path.name not in _NAMING_FOLDERS:
        return path
    return (json.dumps(without_folders(json.loads(path.read_text(encoding="utf-8"))), indent=2) + "\n").encode()

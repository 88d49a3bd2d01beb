"""The Trainer's pushes to the Hub (`push_to_hub=True`), made ours: one commit each, that both doors load."""

import json
import logging
import os
import shlex
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from mxd.hub_cards import HubError, build_card, check_base_id, push_decomposition, update_card
from mxd.hub_cards.hub import with_retries
from mxd.hub_cards.safe_text import without_folders
from mxd.modeling_mxd import MxDModel

from .decomposition_arguments import DecompositionArguments

logger = logging.getLogger(__name__)

_STAGED = "_push-"
_NAMING_FOLDERS = ("config.json", "trainer_state.json", "training_arguments.json")


class HubPushes(Trainer):
    """A Trainer whose pushes are those of `push_decomposition`: one commit that is repeated safely, with our card, code
    and a tokenizer, without folders of this machine.

    While training goes on, pushes run in a thread, from links to a checkpoint's files; one that fails is a warning, and
    the next carries what it had. `push_to_hub()` itself raises, and says how to push later. Of the arguments,
    `hub_model_id`, `hub_private_repo`, `hub_revision`, `hub_token`, `hub_strategy`, `hub_always_push` and our
    `hub_base_model` are honoured. A strategy that pushes checkpoints pushes their optimiser's state too, which is
    pickled; nothing of ours reads it from the Hub.
    """

    args: DecompositionArguments
    decomposition: MxDModel
    hub_model_id: str | None
    push_in_progress: PushInProgress | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repo, before the first step: a Hub that refuses then has cost nothing.

        Raises:
            HubError: the Hub refuses.
            ValueError: the base model is a folder of this machine.
        """
        if not self.is_world_process_zero():
            return
        check_base_id(self.args.hub_base_model or self.decomposition.config.base_model_name_or_path)
        for left in Path(str(self.args.output_dir)).glob(f"{_STAGED}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        private = self.args.hub_private_repo if private is None else private
        api = HfApi(token=token or self.args.hub_token)
        repo = with_retries(lambda: api.create_repo(name, private=private, exist_ok=True), f"making the repo {name}")
        self.hub_model_id, self.push_in_progress = repo.repo_id, None

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Our card instead of the stock one; what a person wrote into an earlier one is kept."""
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
        """Save into `output_dir` and push it, after a push that is still going on.

        Args:
            commit_message: of the commit.
            blocking: wait for it; otherwise a future is returned.
            token, revision, private: over those of the arguments.
            **kwargs: `license`, `tags`, `tag`, `create_pr`, as for `push_decomposition`. What else the stock Trainer's
                card takes is ignored: ours is made from the folder.

        Returns:
            The commit; None on processes other than the first.

        Raises:
            HubError: the Hub refuses; the repo is then as it was, and the folder is kept.
            ValueError: what was trained is not finite.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        how: dict[str, Any] = {name: kwargs[name] for name in ("license", "tags", "tag", "create_pr") if name in kwargs}
        how |= {"message": commit_message, "token": token, "revision": revision}
        if blocking:
            return self._push_output(**how)
        pushed = self._pusher().submit(self._push_output, **how)
        self.push_in_progress = PushInProgress([pushed])
        return pushed

    def _push(self, folder: Path, token: str | None = None, revision: str | None = None, **how: Any) -> CommitInfo:
        assert self.hub_model_id
        how |= {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        return push_decomposition(folder, self.hub_model_id, base_model=self.args.hub_base_model, **how)

    def _push_output(self, **how: Any) -> CommitInfo:
        folder, base = str(self.args.output_dir), self.args.hub_base_model
        revision = how.get("revision") or self.args.hub_revision
        try:
            return self._push(Path(folder), **how)
        except HubError as error:
            command = f"mxd push {shlex.quote(folder)} {self.hub_model_id}"
            command += f" --base-model {base}" if base else ""
            command += f" --revision {revision}" if revision else ""
            raise HubError(f"{error}\nIt is kept in {folder}; to push it later: {command}") from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Stock copies the checkpoint over `output_dir`, pickles its arguments there, the token among them, and uploads
        # that folder; for the checkpoint itself it makes a second commit.
        strategy, current = self.args.hub_strategy, self.push_in_progress
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        going_on = [] if current is None or current.is_done() else current.jobs
        if going_on and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint, step = Path(checkpoint_folder), self.state.global_step
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=self.args.output_dir))
        _link(checkpoint, staged)
        where = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}.get(strategy)
        also = {} if where is None else {f"{where}/{name}": _public(path) for name, path in _files(staged).items()}
        if self.processing_class is not None:
            self.processing_class.save_pretrained(staged)

        def push() -> None:
            try:
                self._push(staged, also=also, message=f"Training in progress, step {step}")
            except Exception as error:  # whatever it is: the training is worth more than the push
                logger.warning("step %d was not pushed, the training goes on: %s", step, error)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        self.push_in_progress = PushInProgress([*going_on, self._pusher().submit(push)])

    def _pusher(self) -> ThreadPoolExecutor:
        """One thread, so that pushes follow each other."""
        if not hasattr(self, "_push_thread"):
            self._push_thread = ThreadPoolExecutor(1, thread_name_prefix="push")
        return self._push_thread


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _link(source: Path, target: Path) -> None:
    """The files of a checkpoint, which may be deleted while they are pushed: their names, not what is in them."""
    for name, path in _files(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target / name)
        except OSError:  # a file system without links
            shutil.copy2(path, target / name)


def _public(path: Path) -> bytes | Path:
    """A file of a checkpoint without this machine's folders."""
    if path.name not in _NAMING_FOLDERS:
        return path
    return (json.dumps(without_folders(json.loads(path.read_text(encoding="utf-8"))), indent=2) + "\n").encode()

"""What a Trainer uploads to the Hub: files named here, and nothing else.

The Trainer's own `push_to_hub` uploads all of `output_dir` but checkpoints, `training_args.bin` with it, and the
strategies `checkpoint` and `all_checkpoints` upload optimizer moments and logs, which tell of the client's data. Here
the files that may leave are copied into a folder of their own, and that folder is uploaded.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import trainer as hf
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from fedfstq_hf.trainer.checkpoint import check_not_uploaded

logger = logging.getLogger(__name__)

CARD = "README.md"
UPLOADED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What may leave of an output or checkpoint folder, beside its card and the tokenizer's own vocabulary files."""
_WITH_CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class Uploads:
    """A Trainer's uploads.

    Args:
        trainer: with `push_to_hub` it is refused a state folder in what is uploaded, and hears that a checkpoint on the
            Hub is none to resume from.
        state_dir: of the client's settings.

    Attributes:
        staged: folders that are being uploaded, each with its job.
    """

    def __init__(self, trainer: Any, state_dir: str | None) -> None:
        self._trainer = trainer
        self.staged: list[tuple[tempfile.TemporaryDirectory[str], Any]] = []
        args = trainer.args
        if not args.push_to_hub:
            return
        check_not_uploaded(state_dir, args.output_dir)
        if args.hub_strategy in _WITH_CHECKPOINTS:
            logger.warning(
                "hub_strategy=%r uploads adapter and tokenizer of checkpoints only: optimizer, random numbers and logs "
                "tell of this client's data and stay here. Training cannot be resumed from the Hub.",
                args.hub_strategy.value,
            )

    def push(
        self,
        commit_message: str | None,
        blocking: bool,
        token: str | None,
        revision: str | None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save adapter, tokenizer and card to `output_dir` and upload them.

        Args:
            commit_message: of the commit.
            blocking: wait until it is uploaded.
            token: in the place of `hub_token`.
            revision: branch to commit to; `hub_revision` when not given.
            private: of a repo that is made now.
            **kwargs: passed on to `create_model_card`.

        Returns:
            What `HfApi.upload_folder` returns: a `CommitInfo`, or a `Future` of it without `blocking`.
        """
        trainer, args = self._trainer, self._trainer.args
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        name = kwargs.pop("model_name", None)
        if name is None and args.should_save:
            name = (args.hub_model_id or Path(args.output_dir).absolute().name).split("/")[-1]
        token = token if token is not None else args.hub_token
        if trainer.hub_model_id is None:
            trainer.init_hf_repo(token=token, **({} if private is None else {"private": private}))
        trainer.save_model(_internal_call=True)  # in all processes
        if not trainer.is_world_process_zero():
            return None
        if tags := getattr(trainer.model, "model_tags", None):
            given = kwargs.get("tags") or []
            given = [given] if isinstance(given, str) else list(given)
            kwargs["tags"] = [*given, *(tag for tag in tags if tag not in given)]
        trainer.create_model_card(model_name=name, **kwargs)
        trainer._finish_current_push()
        return self._upload(
            self._leaving(args.output_dir, card=args.output_dir),
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            revision=args.hub_revision if revision is None else revision,
        )

    def push_checkpoint(self, folder: str) -> None:
        """Upload what may leave of a checkpoint, in the background; nothing while an earlier one is on its way."""
        trainer, args = self._trainer, self._trainer.args
        if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        pushing = trainer.push_in_progress
        busy = pushing is not None and not pushing.is_done()
        if busy and not args.hub_always_push:
            return
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        by_steps = args.save_strategy == SaveStrategy.STEPS
        place = f"step {trainer.state.global_step}" if by_steps else f"epoch {int(trainer.state.epoch)}"
        options = {"token": args.hub_token, "run_as_future": True, "revision": args.hub_revision}
        message = f"Training in progress, {place}"
        files = self._leaving(folder, card=args.output_dir)
        jobs = [self._upload(files, commit_message=message, **options)]
        if args.hub_strategy in _WITH_CHECKPOINTS:
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            files = self._leaving(folder, card=folder)
            where = "last-checkpoint" if last else Path(folder).name
            jobs.append(self._upload(files, path_in_repo=where, commit_message=f"{message}, checkpoint", **options))
        if busy:
            pushing.jobs.extend(jobs)
        else:
            trainer.push_in_progress = PushInProgress(jobs)

    def _leaving(self, folder: str, *, card: str) -> list[tuple[Path, str]]:
        """The files of `folder` that may leave, and the card of another one, each with its path in the upload."""
        root = Path(folder)
        own = [root / name for name in _vocabulary_files(self._trainer.processing_class)]
        found = {path for name in UPLOADED for path in root.glob(name)}.union(own)
        leaving = [(path, path.relative_to(root).as_posix()) for path in sorted(found) if path.is_file()]
        readme = Path(card) / CARD
        return [*leaving, (readme, CARD)] if readme.is_file() else leaving

    def _upload(self, files: Iterable[tuple[Path, str]], **options: Any) -> Any:
        """Copies, as a checkpoint may be deleted and an output folder overwritten before they are uploaded."""
        self.clear()
        staging = tempfile.TemporaryDirectory(prefix="fedfstq-upload-")
        for source, name in files:
            target = Path(staging.name) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        try:
            done = hf.hf_api().upload_folder(repo_id=self._trainer.hub_model_id, folder_path=staging.name, **options)
        except BaseException:
            staging.cleanup()
            raise
        if options["run_as_future"]:
            self.staged.append((staging, done))
        else:
            staging.cleanup()
        return done

    def clear(self) -> None:
        """Delete what has been uploaded, and say what could not be."""
        running = []
        for staging, job in self.staged:
            if not job.done():
                running.append((staging, job))
                continue
            staging.cleanup()
            try:
                job.result()
            except Exception as error:  # of whatever kind: training goes on without it
                logger.warning("An upload to %s failed: %s", self._trainer.hub_model_id, error)
        self.staged = running


def _vocabulary_files(processing_class: Any) -> list[str]:
    """What a tokenizer, or that of a processor, calls its vocabulary files."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    names = getattr(tokenizer, "vocab_files_names", None) or {}
    return [name for name in names.values() if isinstance(name, str) and Path(name).name == name]

"""Hostile mailboxes against a real client: it refuses them in words, or sends its first message and does nothing else.

Every case is a federation's folder with one or several of its files changed (spec, control, round record, adapter
config, adapter, packed change, metrics), or replaced by links, FIFOs and folders. `fedfstq train` joins it: loads the
base model, wraps it, trains and posts. A case is a problem when the client raises anything but this package's errors,
runs longer than 60 s, takes more than 1 GB, writes anything but its own state folder and its own message, reads
a private file, opens a connection, starts a process, unpickles, or imports what a config names. A spec may ask for long
work, and says so before it begins: the client declines more than 100 steps. Linux only. Run:

    python recipes/benchmarks/fuzz_mailbox.py                                # 100,000 cases on two cores
    python recipes/benchmarks/fuzz_mailbox.py --cases 500 --workers 1 --first 7000
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import hostile_run
import tqdm

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the package is imported by the worker processes, after this
os.environ["HF_HUB_OFFLINE"] = "1"

CLIENT, OTHER = "client-a", "client-b"
MAX_GROWTH = 10**9  # bytes that one case may map
MAX_STEPS = 100  # that the client takes in a round


@dataclass(frozen=True)
class Stage:
    """What a worker process keeps between cases: templates of honest federations, and the folders cases run in."""

    root: Path
    templates: tuple[Path, ...]
    watch: hostile.Watch

    @property
    def model(self) -> Path:
        """The client's own base model."""
        return self.root / "model"

    @property
    def data(self) -> Path:
        """The client's own rows."""
        return self.root / "rows.jsonl"


def make_stage(root: Path) -> Stage:
    """Found the honest federations that cases start from: plain, with refinements, with control variates, ..."""
    import fedfstq_hf.recipe as recipes
    from fedfstq_hf.codec.budget import MessageBudget
    from fedfstq_hf.federation.client.participation import LocalResult, MailboxParticipation
    from fedfstq_hf.federation.client.session import ClientSession
    from fedfstq_hf.federation.founding import found_federation
    from fedfstq_hf.federation.mailbox.folder import FolderMailbox
    from fedfstq_hf.federation.server.coordinator import Coordinator
    from fedfstq_hf.running.foundation import found, make_spec

    root.mkdir(parents=True, exist_ok=True)
    (root / hostile.SECRET).write_text(json.dumps({"prompt": "private", "answer": "private"}) + "\n")
    _make_model(root / "model")
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "answer": f"w{i}"} for i in range(4)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods: dict[str, dict[str, Any]] = {
        "plain": {"codec": "fstq", "uplink_budget": "4kB"},
        "refined": {"codec": "fstq", "uplink_budget": "2kB", "refinement_budget": "4kB"},
        "scaffold": {"codec": "fp32", "scaffold": True},
        "binary": {"codec": "fedbat", "learned_binarisation": True},
    }
    mapping = {
        "name": "fuzzed",
        "model": str(root / "model"),
        "data": {"path": str(root / "rows.jsonl"), "format": "jsonl", "max_length": 12},
        "lora": {"r": 2, "lora_alpha": 4},
        "training": {"local_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01, "refresh_steps": 1},
        "federation": {"clients": 2, "clients_per_round": 2, "rounds": 3},
        "methods": methods,
    }
    recipe = recipes.Recipe.from_dict(mapping)
    templates = []
    for number, method in enumerate(methods):
        loaded = recipe.for_method(method)
        founded = found(loaded, number)
        spec = make_spec(loaded, method, founded, seed=number, min_clients=1, share_saliency=number == 0)
        folder = root / f"template-{method}"
        mailbox = FolderMailbox(folder, durable=False)
        found_federation(mailbox, spec, founded.adapter, founded.adapter_config)
        templates.append(folder)
        later = root / f"template-{method}-later"
        shutil.copytree(folder, later)
        mailbox = FolderMailbox(later, durable=False)
        session = ClientSession(OTHER, spec, founded.view.schema, folder=None)
        part = MailboxParticipation(mailbox, session, budget=MessageBudget(fixed=None))
        work = part.next()
        if work is None:
            raise RuntimeError(f"No work in {later}.")
        change = 1e-3 * (1 + work.adapter.sign())
        part.complete(work, LocalResult(work.adapter + change, None, 4, {}, variate=work.variate))
        Coordinator(mailbox).serve(once=True)
        templates.append(later)
    return Stage(root, tuple(templates), hostile.Watch(root / hostile.SECRET))


def run_case(stage: Stage, seed: int) -> str:
    """One case; returns how it ended, `PROBLEM ...` where it may not end like that."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="case-", dir=stage.root, ignore_cleanup_errors=True) as folder:
        box, home, here = (Path(folder) / name for name in ("box", "home", "here"))
        home.mkdir()
        here.mkdir()
        shutil.copytree(draw.choice(stage.templates), box)
        what = _attack(draw, box, stage.root / hostile.SECRET)
        start = time.monotonic()
        with stage.watch.over(_writable(box, home), box, here) as problems:
            try:
                with hostile.limited():
                    end = _join(stage, box, home)
                    _wait_for_threads()
            except hostile.Hang as error:
                end = f"PROBLEM hang: {error}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                end = f"PROBLEM {type(error).__name__}: {error!s:.300}"
        if problems:
            end = f"PROBLEM {problems[0]}"
        if end.startswith("PROBLEM"):
            return f"{end} [{what}; {time.monotonic() - start:.1f} s]"
        return end


def _join(stage: Stage, box: Path, home: Path) -> str:
    """What `fedfstq train --yes` does; the client never waits for a second round."""
    from fedfstq_hf.errors import FedFSTQError
    from fedfstq_hf.running.client_file import ClientFile
    from fedfstq_hf.running.train import run_client

    settings = ClientFile(
        mailbox=str(box),
        client_id=CLIENT,
        data={"path": str(stage.data), "format": "jsonl"},
        model=str(stage.model),
        output_dir=str(home / "out"),
        share_saliency=True,
        poll_seconds=0.001,
        wait_seconds=0.0,
        training={"disable_tqdm": True},
    )
    try:
        run_client(settings, consent=_decline_long_work)
        end = "finished"
    except _DeclinedError:
        end = "declined: it asks for more steps than this client has time for"
    except FedFSTQError as error:
        if not str(error).strip() or re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", str(error)):
            return f"PROBLEM {type(error).__name__} shows control characters or nothing: {error!r:.200}"
        end = f"refused: {type(error).__name__}"
    sent = [] if (box / "updates").is_symlink() else list((box / "updates").rglob(f"{CLIENT}.safetensors"))
    return "message sent" if sent else end


class _DeclinedError(Exception):
    """The person at the client read what is asked, and said no."""


def _decline_long_work(lines: Sequence[str]) -> None:
    """What is asked is shown before anything is loaded; a million steps are no hang, but too long for a case."""
    steps = re.search(r"rounds of ([0-9]+) steps", "\n".join(lines))
    if steps is None or int(steps[1]) > MAX_STEPS:
        raise _DeclinedError


def _wait_for_threads() -> None:
    """A refinement is sent in the background; its case ends with it."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not isinstance(thread, tqdm.TMonitor):
            thread.join()


def _writable(box: Path, home: Path) -> list[str]:
    """Where this client decided to write: its own folder, and its own messages in the mailbox."""
    inside = re.escape(str(home))
    mail = re.escape(str(box))
    own = rf"(\.tmp-)?{CLIENT}\.safetensors[^/]*"
    return [
        rf"{inside}/.*",
        inside,
        rf"{mail}/(updates|refinements)(/[0-9]{{6,}}(/{own})?)?",
        rf"{mail}/attachments(/{CLIENT}(/[^/]*)?)?",
        rf"{mail}/\.[a-z]*\.lock",
        rf"{mail}(/.*)?/\.aside-[^/]*",  # what stands in its way is moved aside, never through a link
        mail,  # made where it is missing
    ]


def _attack(draw: random.Random, box: Path, secret: Path) -> str:
    """Change the mailbox; returns what was done, for the report."""
    head = max(int(p.name) for p in (box / "rounds").iterdir() if p.name.isdigit())
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        target = draw.choices(
            ("spec", "control", "record", "config", "adapter", "change", "metrics", "files"),
            (30, 10, 15, 22, 8, 5, 4, 6),
        )[0]
        done.append(target)
        newest, first = box / "rounds" / f"{head:06d}", box / "rounds" / "000000"
        match target:
            case "spec":
                _change(draw, first / "spec.json", secret)
            case "control":
                _change(draw, box / "control.json", secret, CONTROL)
            case "record":
                _change(draw, newest / "round.json", secret)
            case "config":
                _change(draw, first / "adapter_config.json", secret)
            case "adapter" | "change":
                path = newest / ("adapter_model.safetensors" if target == "adapter" else "frame.safetensors")
                if path.is_file() and not path.is_symlink():
                    data = hostile.mutate_bytes(draw, path.read_bytes())
                    hostile.write(path, data, box)
                    if target == "adapter" and draw.random() < 0.8:
                        _name_adapter(newest / "round.json", data)
            case "metrics":
                name = draw.choice(("x", "eval", "-", "a" * 80))
                path = box / "metrics" / draw.choice((f"{head:06d}", "000000", "999999", "x")) / f"{name}.json"
                posted = hostile.mutate_json(draw, {"eval_loss": 3.0, "b": 1.0}, str(secret))
                hostile.write(path, hostile.dump(posted), box)
            case _:
                done[-1] = _files(draw, box, head, secret)
    return ", ".join(done)


CONTROL = {"format": 1, "paused": None, "clients": {CLIENT: {"repo": "evil/run-x", "max_examples": 3}, OTHER: {}}}


def _change(draw: random.Random, path: Path, secret: Path, honest: Any = None) -> None:
    """Change a JSON file in its structure, or (rarely) in its bytes."""
    value, there = honest, path.is_file() and not path.is_symlink()
    if there:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(path.read_bytes())
    if value is None:
        return
    mutated = hostile.mutate_json(draw, value, str(secret))
    if path.name == "spec.json" and isinstance(mutated, dict) and draw.random() < 0.9:
        _name_spec(mutated)
    changed = hostile.dump(mutated)
    if draw.random() < 0.05:
        changed = hostile.mutate_bytes(draw, changed)
    hostile.write(path, changed, path.parents[1])


def _name_spec(fields: dict[str, Any]) -> None:
    """Give a changed spec the id of its content, as its founder would."""
    from fedfstq_hf.federation.spec import FederationSpec

    content = {name: value for name, value in fields.items() if name != "id"}
    with contextlib.suppress(Exception):  # a spec that cannot be made has no id
        fields["id"] = FederationSpec(**content).id


def _name_adapter(path: Path, adapter: bytes) -> None:
    """Let the record vouch for a changed adapter."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError):
        # an earlier attack of the same case may have put a link, a pipe or a device there
        fields = json.loads(path.read_bytes() if path.is_file() and not path.is_symlink() else b"")
        fields |= {"adapter_sha256": hashlib.sha256(adapter).hexdigest(), "adapter_bytes": len(adapter)}
        hostile.write(path, hostile.dump(fields), path.parents[1])


def _files(draw: random.Random, box: Path, head: int, secret: Path) -> str:
    """Something odd in the place of a file or folder."""
    places = [
        box / "control.json",
        box / "rounds" / f"{head:06d}" / "round.json",
        box / "rounds" / f"{head:06d}" / "adapter_model.safetensors",
        box / "rounds" / "000000" / "adapter_config.json",
        box / "rounds" / f"{head + 1:06d}",
        box / "updates" / f"{head:06d}" / f"{CLIENT}.safetensors",
        box / "updates" / f"{head:06d}",
        box / "updates",
        box / "attachments" / CLIENT,
        box / "metrics",
        box / "metrics" / f"{head:06d}" / "x.json",
    ]
    place = draw.choice(places)
    if place.name in ("updates", "metrics", CLIENT, f"{head:06d}") and place.parent.name != "rounds":
        if not place.exists() and not place.is_symlink() and place.parent.is_dir() and draw.random() < 0.7:
            place.symlink_to(draw.choice((secret.with_name(hostile.OUTSIDE), Path("/tmp"), place.parent / "nowhere")))
            return f"{place.relative_to(box)}: link to a folder"
        return "nothing"
    data = place.read_bytes() if place.is_file() and not place.is_symlink() else b"{}"
    return f"{place.relative_to(box)}: {hostile.plant(draw, place, data, secret)}"


def _make_model(folder: Path) -> None:
    """A random Llama of some hundred numbers with its tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(13))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), num_key_value_heads=2, max_position_embeddings=16, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


_stage: Stage | None = None


def batch(root: str, first: int, count: int) -> hostile_run.Outcome:
    """A worker's share; the first of a process makes its stage, and honest cases warm up what imports lazily."""
    global _stage
    if _stage is None:
        from transformers.utils.logging import disable_progress_bar

        logging.disable(logging.CRITICAL)
        disable_progress_bar()
        _stage = make_stage(Path(tempfile.mkdtemp(prefix="worker-", dir=root)))
        for template in _stage.templates:
            with tempfile.TemporaryDirectory(dir=_stage.root) as folder:
                box, home = Path(folder) / "box", Path(folder) / "home"
                home.mkdir()
                shutil.copytree(template, box)
                end = _join(_stage, box, home)
                _wait_for_threads()  # a refinement may still be written
                if end != "message sent":
                    raise RuntimeError(f"The honest mailbox {template.name}: {end}")
        _keep_base(_stage)
        gc.collect()
        gc.freeze()  # the Trainer collects garbage at every end: what imports made is none
        hostile_run.limit_memory(MAX_GROWTH)
    stage = _stage
    return hostile_run.run_batch(lambda seed: run_case(stage, seed), root, first, count)


def _keep_base(stage: Stage) -> None:
    """The client names its own base model, so no mailbox has a part in loading it: it is loaded once and copied."""
    from fedfstq_hf.running import train

    kept = train.load_base(str(stage.model), "float32")
    train.load_base = lambda name, dtype: copy.deepcopy(kept)


if __name__ == "__main__":
    sys.exit(hostile_run.run_all(batch, hostile_run.arguments(__doc__)))

"""How many files of the package one reads to follow a thing: those whose functions run on its way.

Run: `python recipes/benchmarks/trace.py [update message recipe generate]` (all four take less than a minute).
Prints, for each way, the number of files under `fedfstq_hf/` and their names. All on the embedded demo model:

    update    from a client's `training_step` to its message in a folder mailbox
    message   from the message to the published adapter
    recipe    a tiny recipe, from the YAML to its report
    generate  one token-reduced `generate()`

Only functions count, not what runs at import: update and message are those of a second round.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import transformers
from transformers import TrainerCallback

import fedfstq_hf
from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer, TokenReducer
from fedfstq_hf.demo import load_model, load_tokenizer, make_examples
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.open import open_mailbox
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.running.foundation import found, make_spec, quiet_arguments
from fedfstq_hf.simulation.runner import Simulation
from fedfstq_hf.workloads import Collator, load_workload

PACKAGE = Path(fedfstq_hf.__file__).parent
BARS = {"update": 15, "message": 20, "recipe": 60, "generate": 8}
TINY = {
    "federation.clients": "2",
    "federation.clients_per_round": "2",
    "federation.min_examples": "4",
    "training.local_steps": "2",
    "training.per_device_train_batch_size": "2",
    "data.train_limit": "24",
    "data.test_limit": "4",
}


@contextlib.contextmanager
def traced(files: set[str]) -> Iterator[None]:
    """Within it, every file of the package in which a function begins is added to `files`."""

    def see(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:  # no module, no class body
            with contextlib.suppress(ValueError):
                files.add(Path(code.co_filename).relative_to(PACKAGE).as_posix())

    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(None)


class SecondRound(TrainerCallback):  # type: ignore[misc]
    """Traces a client's second round, and plays the coordinator at the end of each."""

    def __init__(self, coordinator: Coordinator, local_steps: int) -> None:
        self.coordinator, self.local_steps = coordinator, local_steps
        self.update: set[str] = set()
        self.message: set[str] = set()
        self._tracing = contextlib.ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start where the second round's first `training_step` does."""
        if state.global_step == self.local_steps:
            self._tracing.enter_context(traced(self.update))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer has posted: stop, and aggregate."""
        if state.global_step == self.local_steps:
            self.coordinator.close_round()
        elif state.global_step == 2 * self.local_steps:
            self._tracing.close()
            with traced(self.message):
                self.coordinator.close_round()


def trace_round(folder: Path) -> dict[str, set[str]]:
    """One client of the quickstart's method `fstq`, and its coordinator."""
    recipe = load_recipe("quickstart", {**TINY, "federation.rounds": "2"})
    founding = found(recipe, seed=0)
    spec = make_spec(recipe, "fstq", founding, seed=0, min_clients=1)
    mailbox = open_mailbox(str(folder / "box"))
    found_federation(mailbox, spec, founding.adapter, founding.adapter_config)
    watch = SecondRound(Coordinator(mailbox), spec.local_steps)
    trainer = FedFSTQTrainer(
        model=founding.model,
        args=quiet_arguments(folder / "client", **spec.client_defaults),
        train_dataset=load_workload(recipe.data, founding.tokenizer, need_test=False).train,
        data_collator=Collator(founding.tokenizer.pad_token_id),
        federation=FedFSTQConfig(mailbox=str(folder / "box"), client_id="a", poll_seconds=0.01),
    )
    trainer.add_callback(watch)  # behind the trainer's own, which posts
    trainer.train()
    return {"update": watch.update, "message": watch.message}


def trace_recipe(folder: Path) -> set[str]:
    """Two methods for one round, to the report."""
    files: set[str] = set()
    with traced(files):
        Simulation(load_recipe("quickstart", {**TINY, "federation.rounds": "1"}), folder / "run").run()
    return files


def trace_generate() -> set[str]:
    """A prompt of a few hundred tokens, half of which are kept."""
    model, tokenizer = load_model(), load_tokenizer()
    prompt = "".join(example["prompt"] for example in make_examples(3, seed=0))
    inputs = tokenizer(prompt, return_tensors="pt")
    files: set[str] = set()
    with traced(files):
        model.generate(**inputs, custom_generate=TokenReducer(keep_ratio=0.5), max_new_tokens=2, do_sample=False)
    return files


def main() -> None:
    """Trace what the command line names."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("fedfstq_hf").setLevel(logging.ERROR)
    asked = sys.argv[1:] or list(BARS)
    seen: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if {"update", "message"} & set(asked):
            seen |= trace_round(Path(folder))
        if "recipe" in asked:
            seen["recipe"] = trace_recipe(Path(folder))
        if "generate" in asked:
            seen["generate"] = trace_generate()
    for way in asked:
        print(f"{way}: {len(seen[way])} files (bar {BARS[way]})")
        print("".join(f"    {name}\n" for name in sorted(seen[way])), end="")


if __name__ == "__main__":
    main()

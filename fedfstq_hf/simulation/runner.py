"""`fedfstq simulate`: the methods of a recipe side by side, seed by seed, from one folder that can be resumed.

```
OUT/recipe.json metrics.jsonl summary.json report.html report.md *.png adapter/      what one reads
OUT/runs/METHOD/seed-S/mailbox, clients/                                             each run's federation, for resuming
```
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation import storage
from fedfstq_hf.federation.client.session import Caps
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_CONFIG_FILE, ADAPTER_FILE, SPEC_FILE
from fedfstq_hf.recipe import Recipe, validate
from fedfstq_hf.recipe.network import LinkProfile, LinkRates, draw_rates
from fedfstq_hf.recipe.sections import RecipeMethod, TimeCap
from fedfstq_hf.reporting.comparison.summary import COMPARED, TargetRule, read_rows, summarize, write_summary
from fedfstq_hf.reporting.run_report import write_run_report
from fedfstq_hf.running.evaluate import Evaluator
from fedfstq_hf.running.foundation import Founding, found, make_spec, training_arguments
from fedfstq_hf.simulation.population import make_plan, make_shards
from fedfstq_hf.simulation.simulated_participation import FOUNDED, Row, SimulatedParticipation, TrainElsewhere
from fedfstq_hf.simulation.workers import Job, WorkerPool
from fedfstq_hf.trainer.trainer import FedFSTQTrainer
from fedfstq_hf.workloads import Collator, load_workload

ROWS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
RECIPE_FILE = "recipe.json"
_WORDS = ("name", "description", "target")  # of a recipe: what no row depends on


@dataclass(frozen=True)
class _Shared:
    """What all methods of a seed have in common; the links' rates are set by the recipe's own adapter."""

    seed: int
    datasets: list[Any]
    collator: Collator
    evaluator: Evaluator
    plan: Any
    links: list[tuple[LinkProfile, LinkRates]]
    link_params: int


class Simulation:
    """All methods and seeds of a recipe.

    Args:
        recipe: what to run.
        folder: where everything goes.
        resume: go on with what an interrupted run of the same recipe left in `folder`.
        progress: show a progress bar.
        command: what the user typed, for the report.
        workers: processes that train a round's clients side by side; 1 trains them here, one after the other.

    Raises:
        ConfigError: `folder` is in use and `resume` is not set, or it holds another recipe's run.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: str | Path,
        *,
        resume: bool = False,
        progress: bool = True,
        command: str = "",
        workers: int = 1,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"workers must be at least 1, not {workers!r}.")
        validate(recipe)
        self._workers = workers
        self.recipe = recipe
        self._command = command or f"fedfstq simulate {recipe.name}"
        self.folder = Path(folder)
        self._progress = progress
        self._prepare_folder(resume)
        self._rows: list[Row] = self._read_rows()

    def run(self) -> dict[str, Any]:
        """Run what is missing; returns the summary, which also stands in `summary.json`."""
        recipe = self.recipe
        total = len(recipe.methods) * len(recipe.seeds) * recipe.federation.rounds
        done = sum(row["round"] > 0 for row in self._rows)
        with tqdm(total=total, initial=done, unit="round", disable=not self._progress, dynamic_ncols=True) as bar:
            for seed in recipe.seeds:
                missing = [name for name in recipe.methods if not self._complete(name, seed)]
                if missing:
                    self._run_seed(seed, missing, bar)
        return self._finish()

    def _run_seed(self, seed: int, methods: list[str], bar: Any) -> None:
        recipe, federation = self.recipe, self.recipe.federation
        founding = found(recipe, seed)
        workload = load_workload(recipe.data, founding.tokenizer, held_out=recipe.evaluation.split)
        shards = make_shards(
            workload.train,
            federation.clients,
            partition=federation.partition,
            alpha=federation.alpha,
            seed=seed,
            min_size=federation.min_examples,
        )
        datasets = [[workload.train[i] for i in shard] for shard in shards]
        collator = Collator(founding.tokenizer.pad_token_id)
        evaluator = Evaluator(workload.test, collator.pad_id, recipe.evaluation.batch_size, bf16=recipe.training.bf16)
        plan = make_plan(federation.clients, federation.clients_per_round, federation.rounds, federation.dropout, seed)
        profiles = [profile.for_adapter(founding.view.schema.num_params) for profile in recipe.links]
        links = [(profile, draw_rates(profile, federation.clients, seed)) for profile in profiles]
        shared = _Shared(seed, datasets, collator, evaluator, plan, links, founding.view.schema.num_params)
        own = {method: recipe.for_method(method) for method in methods}
        while methods:
            # one model and one pool of workers for all methods with the same adapter
            alike = [method for method in methods if own[method].lora == own[methods[0]].lora]
            methods = [method for method in methods if method not in alike]
            same = own[alike[0]].lora == recipe.lora
            self._run_methods(alike, founding if same else found(own[alike[0]], seed), shared, bar)

    def _run_methods(self, methods: list[str], founding: Founding, shared: _Shared, bar: Any) -> None:
        """The methods of one seed that have the same adapter."""
        seed, collator, datasets, evaluator = shared.seed, shared.collator, shared.datasets, shared.evaluator
        pool: Any = contextlib.nullcontext()
        if self._workers > 1:
            pool = WorkerPool(self._workers, founding.model, datasets, collator.pad_id, evaluator)
        measure = partial(_measure, founding, evaluator) if self._workers == 1 else pool.evaluate
        federation = self.recipe.federation
        with pool:
            for method in methods:
                recipe = self.recipe.for_method(method)
                folder = self._run_folder(method, seed)
                caps = _caps(recipe.methods[method], shared.links, len(datasets))
                spec = make_spec(
                    recipe,
                    method,
                    founding,
                    seed=seed,
                    min_clients=1,
                    mean_examples=_mean_examples(datasets),
                    everybody=federation.clients_per_round >= federation.clients,
                )
                mailbox = FolderMailbox(folder / "mailbox", durable=False)
                if not (mailbox.path / "rounds" / "000000").exists():
                    found_federation(mailbox, spec, founding.adapter, founding.adapter_config, now=FOUNDED)
                participation = SimulatedParticipation(
                    folder,
                    label={"method": method, "seed": seed},
                    plan=shared.plan,
                    datasets=datasets,
                    links=shared.links,
                    evaluate=self._timed(measure),
                    rows=[row for row in self._rows if (row["method"], row["seed"]) == (method, seed)],
                    emit=self._emit_to(bar, method, seed),
                    loss=(federation.packet_loss, federation.retransmissions, seed),
                    # an operator knows about how many of those who are asked answer, and says it as min_clients
                    expected=max(1, round(federation.clients_per_round * (1 - federation.dropout))),
                    caps=caps,
                    link_params=shared.link_params,
                    train=None if self._workers == 1 else self._train_with(recipe, pool, mailbox, folder, seed, caps),
                )
                try:
                    if self._workers > 1:
                        participation.next()  # to the end: there is nothing left to train here
                    else:
                        trainer = FedFSTQTrainer(
                            model=founding.model,
                            args=training_arguments(recipe, folder, seed=seed),
                            train_dataset=datasets[0],
                            data_collator=collator,
                        )
                        trainer.remove_callback(PrinterCallback)  # the progress bar says it all
                        trainer.take_part(participation, spec)
                finally:
                    participation.close()

    def _train_with(
        self,
        recipe: Recipe,
        pool: WorkerPool,
        mailbox: FolderMailbox,
        folder: Path,
        seed: int,
        caps: tuple[Caps, ...],
    ) -> TrainElsewhere:
        arguments = {**recipe.training.trainer_kwargs(), "seed": seed}
        return partial(pool.train, Job(folder, mailbox.read(0, SPEC_FILE), arguments, caps))

    def _timed(self, measure: Callable[[Tensor], dict[str, float]]) -> Callable[[Tensor], Mapping[str, float]]:
        metric = self.recipe.evaluation.metric

        def evaluate(adapter: Tensor) -> Mapping[str, float]:
            started = time.perf_counter()
            values = measure(adapter)
            return {"metric": values[metric], **values, "eval_seconds": time.perf_counter() - started}

        return evaluate

    def _emit_to(self, bar: Any, method: str, seed: int) -> Callable[[Row], None]:
        metric = self.recipe.evaluation.metric

        def emit(row: Row) -> None:
            with open(self.folder / ROWS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, sort_keys=True) + "\n")
            self._rows.append(row)
            if row["round"] > 0:
                bar.update()
            bar.set_description(
                f"{method} seed {seed} round {row['round']}/{self.recipe.federation.rounds}", refresh=False
            )
            bar.set_postfix_str(f"{metric} {row['metric']:.4f}, uplink {row['cumulative_uplink_bytes'] / 1e6:.3f} MB")

        return emit

    def _finish(self) -> dict[str, Any]:
        recipe = self.recipe
        rule = TargetRule(recipe.target.of, recipe.target.fraction, recipe.target.consecutive)
        summary = summarize(
            self._rows, metric=recipe.evaluation.metric, higher_is_better=recipe.evaluation.higher_is_better, rule=rule
        )
        write_summary(self.folder / SUMMARY_FILE, summary)
        write_run_report(self.folder, command=self._command)
        self._copy_adapter()
        return summary

    def _copy_adapter(self) -> None:
        """The first seed's final adapter of `fstq` (of the last method where there is none) as a PEFT folder."""
        methods = list(self.recipe.methods)
        method = COMPARED if COMPARED in methods else methods[-1]
        mailbox = self._run_folder(method, self.recipe.seeds[0]) / "mailbox"
        target = self.folder / "adapter"
        target.mkdir(exist_ok=True)
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            shutil.copyfile(mailbox / name, target / name)

    def _run_folder(self, method: str, seed: int) -> Path:
        return self.folder / "runs" / method / f"seed-{seed}"

    def _complete(self, method: str, seed: int) -> bool:
        last = max((row["round"] for row in self._rows if (row["method"], row["seed"]) == (method, seed)), default=-1)
        return bool(last >= self.recipe.federation.rounds)

    def _prepare_folder(self, resume: bool) -> None:
        marker = self.folder / RECIPE_FILE
        recipe = json.loads(json.dumps(self.recipe.to_dict()))
        if marker.exists():
            if not resume:
                raise ConfigError(
                    f"{self.folder} holds a run already. Go on with it by --resume, or give another --out."
                )
            try:
                found = json.loads(marker.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{marker} cannot be read ({error}). Give another --out.") from error
            if not same_settings(found, self.recipe):
                raise ConfigError(
                    f"{self.folder} holds a run of other settings ({marker}). Repeat its command, or give another "
                    "--out."
                )
            if found != recipe:
                storage.replace_file(marker, (json.dumps(recipe, indent=1) + "\n").encode(), durable=False)
            return
        storage.make_folder(self.folder, durable=False)
        storage.remove_leftovers(self.folder)
        if any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty and holds no run. Give a new folder with --out.")
        storage.replace_file(marker, (json.dumps(recipe, indent=1) + "\n").encode(), durable=False)

    def _read_rows(self) -> list[Row]:
        path = self.folder / ROWS_FILE
        if not path.exists():
            return []
        rows = read_rows(path)
        # A torn last line must go before anything is appended behind it.
        whole = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        partial = path.with_suffix(".partial")
        partial.write_text(whole, encoding="utf-8")
        partial.replace(path)
        return rows


def same_settings(found: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether the run whose `recipe.json` is `found` is one of `recipe`, words and targets apart.

    Settings that an earlier version of this package did not have yet count with their defaults.
    """
    try:
        known = Recipe.from_dict(found, RECIPE_FILE).to_dict()
    except ConfigError:
        return False
    return all(known[key] == value for key, value in recipe.to_dict().items() if key not in _WORDS)


def _caps(settings: RecipeMethod, links: Sequence[tuple[LinkProfile, LinkRates]], clients: int) -> tuple[Caps, ...]:
    """Bytes that each client's link carries in the time that its messages may take."""

    def most(cap: TimeCap | None) -> list[int | None]:
        if cap is None:
            return [None] * clients
        rates = next(rates for profile, rates in links if profile.name == cap.link)
        return [int(cap.seconds * rate / 8) for rate in rates.uplink.tolist()]

    return tuple(map(Caps, most(settings.time_cap), most(settings.refinement_time_cap)))


def _mean_examples(datasets: Sequence[Sequence[Any]]) -> int:
    """Of a client, at least 1."""
    return max(1, round(sum(map(len, datasets)) / len(datasets)))


def _measure(founding: Founding, evaluator: Evaluator, adapter: Tensor) -> dict[str, float]:
    founding.view.write(adapter)
    return evaluator(founding.model)


_INSTRUCTIONS = {"x86_64": ("amx_bf16", "avx512_bf16"), "aarch64": ("bf16", "sve_bf16")}


def slow_bf16(recipe: Recipe) -> str | None:
    """A sentence for who runs `recipe` with `bf16: true` on a processor without bfloat16 instructions; else None.

    PyTorch computes the same there, converting every operand, and a run takes about ten times as long.
    """
    if not recipe.training.bf16 or torch.accelerator.is_available() or has_bf16(_capabilities()):
        return None
    return (
        "bf16: true, but this processor has no bfloat16 instructions and PyTorch imitates them, which takes about ten "
        "times as long. To train in float32: --training.bf16 false (run.py: --float32)."
    )


def has_bf16(capabilities: Mapping[str, Any]) -> bool:
    """Whether `torch.cpu.get_capabilities()` shows bfloat16 instructions; True where it does not say.

    Args:
        capabilities: name of an instruction set to whether the processor has it, and `architecture`.
    """
    names = _INSTRUCTIONS.get(capabilities.get("architecture", ""), ())
    known = [bool(capabilities[name]) for name in names if name in capabilities]
    return any(known) or not known


def _capabilities() -> Mapping[str, Any]:
    read = getattr(torch.cpu, "get_capabilities", None)  # not in PyTorch's older versions
    return read() if read is not None else {}

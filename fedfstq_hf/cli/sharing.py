"""`fedfstq compress | expand`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedfstq_hf.cli.options import quieten
from fedfstq_hf.errors import ConfigError

app = typer.Typer()


@app.command()
def compress(
    adapter: Annotated[Path, typer.Argument(help="Folder of a trained PEFT LoRA adapter.")],
    out: Annotated[Path | None, typer.Option(help="New folder for the compressed adapter.")] = None,
    push: Annotated[
        str | None, typer.Option(help="ORG/NAME on the Hub to publish it in, with or without --out.")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Size of all files that loading needs: 2bpp (bits a parameter), 96kB.")
    ] = ("2bpp"),
    base_model: Annotated[
        str | None, typer.Option(help="Base model, a folder or a Hub id; the adapter's own when not given.")
    ] = None,
    base_model_name: Annotated[
        str | None, typer.Option(help="The base model's id on the Hub, for others, where it lies in a folder here.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Examples of its task: a .jsonl file, a Hub data set, or demo.")
    ] = None,
    format: Annotated[str, typer.Option(help="How columns become prompt and answer: jsonl, fed_med, ...")] = "jsonl",
    calibration: Annotated[int, typer.Option(help="Training examples that say what matters; 0: none.")] = 64,
    refine: Annotated[
        int,
        typer.Option(help="Steps of training through the rounding, on the calibration examples: 200 with 256 of them."),
    ] = 0,
    evaluation: Annotated[int, typer.Option(help="Held-out examples to measure quality on; 0: none.")] = 200,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and answer together.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Of calibration and evaluation.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the base model: float32 or bfloat16.")] = "float32",
    init_seed: Annotated[
        int | None, typer.Option(help="Seed that the adapter was started from, if known; it may save bytes.")
    ] = None,
    codec: Annotated[str, typer.Option(help="Codec of the LoRA matrices.")] = "uniform",
    include_plain: Annotated[
        bool, typer.Option("--include-plain", help="Add adapter_model.safetensors, for plain PEFT.")
    ] = False,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a repo that --push makes.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card, such as apache-2.0.")] = None,
) -> None:
    """Compress any trained LoRA adapter to a few bits per parameter, and measure what that costs.

    Example: fedfstq compress my-adapter --out my-adapter-small --budget 2bpp --data notes.jsonl
    """
    if out is None and push is None:
        raise ConfigError("Say where the compressed adapter goes: type --out FOLDER, or --push ORG/NAME, or both.")
    if out is not None and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise ConfigError(f"{out} exists already and was left alone. Give another folder, or remove it first.")
    if calibration < 0 or evaluation < 0 or batch_size < 1:
        raise ConfigError("--calibration and --evaluation take 0 or more, --batch-size 1 or more.")
    if refine and (data is None or not calibration):
        raise ConfigError("--refine needs examples to learn from; type --data FILE, and --calibration 256 or so.")
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype is {dtype!r}; expected float32 or bfloat16.")
    quieten()
    from fedfstq_hf.reporting.card.markup import is_path
    from fedfstq_hf.sharing.compress import compress_adapter
    from fedfstq_hf.sharing.hub import open_repo, publish
    from fedfstq_hf.sharing.trained import fit_vocabulary, load_task_base, read_config

    repo = None if push is None else open_repo(push)
    fields = read_config(adapter)
    own = fields.get("base_model_name_or_path")
    name = base_model or own
    if not name:
        raise ConfigError(f"The adapter in {adapter} names no base model; type --base-model NAME.")
    if base_model_name is None and base_model is not None and not is_path(base_model) and (not own or is_path(own)):
        base_model_name = base_model
    examples: dict[str, Any] = {}
    if data is None:
        base: Any = load_task_base(str(name), adapter, dtype)
    elif fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise ConfigError(
            f"--data is for adapters that predict text (CAUSAL_LM), this one's task_type is {fields['task_type']}: "
            "leave it out, or call compress_adapter with an evaluation function of your own."
        )
    else:
        from fedfstq_hf.running.foundation import load_base
        from fedfstq_hf.workloads import DataConfig, load_workload

        base, tokenizer = load_base(str(name), dtype)
        fit_vocabulary(base, adapter)
        kind = "demo" if data == "demo" else format
        workload = load_workload(
            DataConfig(path=data, format=kind, max_length=max_length), tokenizer, need_test=evaluation > 0
        )
        examples = {
            "calibration": workload.train[:calibration] or None,
            "evaluation": workload.test[:evaluation] or None,
        }
    about = {
        "name": adapter.name,
        "license": license,
        "datasets": data,
        "repo_id": None if repo is None else repo.repo_id,
    }
    made = compress_adapter(
        adapter,
        budget,
        base_model=base,
        init_seed=init_seed,
        refine_steps=refine,
        progress=True,
        codec=codec,
        include_plain=include_plain,
        batch_size=batch_size,
        about=about,
        base_model_name=base_model_name,
        **examples,
    )
    if out is not None:
        made.save(out)
    if repo is not None:
        publish(made, repo, private=private)
    typer.echo(str(made))
    where = push or str(out)
    typer.echo(f"Load it with: load_compressed_adapter(base, {where!r})")


@app.command()
def expand(
    adapter: Annotated[str, typer.Argument(help="A compressed adapter: a folder, or ORG/NAME on the Hub.")],
    out: Annotated[Path, typer.Option(help="New folder for the plain adapter.")],
    base_model: Annotated[
        str | None, typer.Option(help="Its base model, a folder or a Hub id; what the adapter names when not given.")
    ] = None,
) -> None:
    """Write a compressed adapter as the plain one that PeftModel.from_pretrained loads. No weights of the base needed.

    Example: fedfstq expand my-adapter-small --out my-adapter-plain
    """
    quieten()
    from fedfstq_hf.sharing.hub import expand_adapter

    expand_adapter(adapter, out, base_model=base_model)
    typer.echo(f"Load it with: PeftModel.from_pretrained(base, {str(out)!r})")

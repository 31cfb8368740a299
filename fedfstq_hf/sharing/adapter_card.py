"""The card of a compressed adapter: what it is, how to load it, what compression cost and saved. Measured or unsaid."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from fedfstq_hf.reporting.card.markup import TASKS, code, hub_id, license_id, one_line, texts
from fedfstq_hf.reporting.units import format_ratio
from fedfstq_hf.sharing.packed import EXACT_FILE, CompressedAdapter

_TEMPLATE = "adapter_card_template.md"
_TAGS = ("peft", "lora", "fedfstq", "compressed-adapter")


def render_card(
    made: CompressedAdapter,
    config: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    codec: str,
    num_examples: int,
    base_class: str = "",
    num_labels: int | None = None,
) -> str:
    """The text of `README.md`.

    Args:
        made: the adapter with its measurements.
        config: PEFT's configuration.
        about: each optional: `name`, `repo_id`, `license`, `datasets`, `tags`. What the Hub would refuse is left out.
        codec: of the LoRA matrices.
        num_examples: calibration examples; 0 without calibration.
        base_class: of the base model; it is named where the adapter's configuration says no task.
        num_labels: classes of the head that the adapter brings along.
    """
    base = config.get("base_model_name_or_path")
    kind = config.get("task_type")
    task, auto_class = TASKS.get(str(getattr(kind, "value", kind)), (None, base_class or "AutoModelForCausalLM"))
    repo_id = hub_id(about.get("repo_id"))
    license, license_name = license_id(about.get("license"))
    data = ModelCardData(
        base_model=hub_id(base),
        library_name="peft",
        pipeline_tag=task,
        license=license,
        license_name=license_name,
        datasets=[name for name in texts(about.get("datasets")) if hub_id(name)] or None,
        tags=[*_TAGS, *(tag for tag in texts(about.get("tags")) if tag not in _TAGS)],
    )
    with resources.as_file(resources.files(__package__) / _TEMPLATE) as template:
        card = ModelCard.from_template(
            data,
            template_path=str(template),
            title=one_line(about.get("name")) or (repo_id or "Compressed LoRA adapter").split("/")[-1],
            introduction=_introduction(made, code(base)),
            loading=_loading(hub_id(base), auto_class, repo_id, num_labels),
            loading_note=_loading_note(made, repo_id),
            quality=[
                {"name": code(name), "before": f"{made.before[name]:.4f}", "after": f"{made.after[name]:.4f}"}
                for name in made.after
            ],
            effect=None if made.effect is None else f"{100 * made.effect:.2g} %",
            files=[{"name": name, "bytes": f"{len(content):,}"} for name, content in made.files.items()],
            total=f"{made.num_bytes:,}",
            plain=f"{made.plain_bytes:,}",
            size_note=_size_note(made),
            making=_making(made, config, codec, num_examples),
        )
    return f"{str(card).rstrip()}\n"


def _introduction(made: CompressedAdapter, base: str | None) -> str:
    return (
        f"A LoRA adapter{f' for {base}' if base else ''} in packed form: {made.num_params:,} parameters in "
        f"{made.num_bytes:,} bytes, {made.bits_per_param:.2f} bits per parameter, "
        f"{format_ratio(made.plain_bytes / made.num_bytes)} smaller than the plain adapter. The values are approximate."
    )


def _loading(base: str | None, auto_class: str, repo_id: str | None, num_labels: int | None) -> str:
    labels = "" if num_labels is None else f", num_labels={num_labels}"
    return (
        f"from transformers import {auto_class}\n"
        "from fedfstq_hf import load_compressed_adapter\n\n"
        f'base = {auto_class}.from_pretrained("{base or "BASE-MODEL"}"{labels})\n'
        f'model = load_compressed_adapter(base, "{repo_id or "FOLDER"}")'
    )


def _loading_note(made: CompressedAdapter, repo_id: str | None) -> str:
    package = "`pip install fedfstq_hf` first. Another base model than the one it was made for is refused."
    if made.plain is None:
        return package
    where = repo_id or "FOLDER"
    return f'{package} Without that package, `PeftModel.from_pretrained(base, "{where}")` loads the same values.'


def _size_note(made: CompressedAdapter) -> str:
    note = "This card is not needed for loading, and not counted."
    if made.plain is not None:
        note += f" Neither is `adapter_model.safetensors` ({len(made.plain):,} bytes), which is there for plain PEFT."
    return note


def _making(made: CompressedAdapter, config: Mapping[str, Any], codec: str, num_examples: int) -> str:
    weighed = (
        f"Fisher information from {num_examples} calibration examples says which inputs and outputs of a module matter"
        if num_examples
        else "No calibration set was used: every entry of a module's product counts the same"
    )
    form = (
        "The matrices are coded as a change from PEFT's seeded start, which is drawn again from its seed when the "
        "adapter is loaded, and held against its sha256."
        if made.seeded
        else "Each pair of matrices is coded whole"
        + (", after it was turned into an equal product of orthogonal components." if codec == "uniform" else ".")
    )
    refined = ""
    if "refined" in made.errors:
        before, after = made.errors["coded"], made.errors["refined"]
        refined = (
            f" {made.refine_steps} steps of training through the rounding, on the calibration examples (so that the "
            "adapter is trained further on them), took their loss plus the divergence from the trained adapter's "
            f"predictions from {before:.5f} to {after:.5f} nats per target token."
            if after < before
            else f" {made.refine_steps} steps of training through the rounding brought nothing and were discarded."
        )
    exact = f" Tensors that are no LoRA matrices are in `{EXACT_FILE}`." if EXACT_FILE in made.files else ""
    return (
        f"Codec `{codec}` of `fedfstq_hf`, rank {config.get('r')}, alpha "
        f"{config.get('lora_alpha'):g}. {weighed}. {form}{refined}{exact}"
    )

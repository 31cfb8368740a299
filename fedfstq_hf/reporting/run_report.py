"""`report.md`: what a comparison found, how to run it again, and what in it was modelled; all made from data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from fedfstq_hf.recipe.schema import FederationSettings, Recipe
from fedfstq_hf.reporting.comparison.summary import COMPARED, REFERENCE, Row, curves, read_rows
from fedfstq_hf.reporting.plots import make_plots
from fedfstq_hf.reporting.units import format_bytes, format_figure, format_ratio, format_seconds
from fedfstq_hf.simulation.network import LinkProfile
from fedfstq_hf.simulation.packets import PACKET_BYTES

_PLOT_TITLES = {
    "quality_vs_uplink": "Quality against cumulative uplink",
    "quality_vs_time_": "Quality against simulated time",
    "bytes_per_round": "Bytes per round",
}


def write_report(folder: str | Path, *, command: str | None = None) -> Path:
    """Draw the plots and write `report.md` for the run in `folder`, from its recipe, metric rows and summary.

    `command` is the line that reruns the comparison; returns the path of the report.
    """
    folder = Path(folder)
    rows = read_rows(folder / "metrics.jsonl")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    recipe = Recipe.from_dict(json.loads((folder / "recipe.json").read_text(encoding="utf-8")), "recipe.json")
    plots = make_plots(rows, summary, folder)
    path = folder / "report.md"
    text = render_report(rows, summary, recipe, command=command, plots=[plot.name for plot in plots])
    path.write_text(text, encoding="utf-8")
    return path


def render_report(
    rows: Sequence[Row],
    summary: Mapping[str, Any],
    recipe: Recipe,
    *,
    command: str | None = None,
    plots: Sequence[str] = (),
) -> str:
    """The report as Markdown."""
    parts = [
        f"# {recipe.name}",
        " ".join(recipe.description.split()),
        f"```\n{command or 'fedfstq simulate RECIPE.yaml   # the recipe below, saved as a file'}\n```",
        _findings(summary),
        "## Figures",
        _table(summary),
        _target(summary),
        *(f"![{_plot_title(name)}]({name})" for name in plots),
        _energy_table(rows),
        "## What was measured and what was modelled",
        _caveats(recipe),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _findings(summary: Mapping[str, Any]) -> str:
    """The comparison in sentences: ratios where both methods reached the target, who missed it, where it ended."""
    methods, spread = summary["methods"], summary["spread"]
    lines = []
    ratios = summary["ratios"]
    if ratios["uplink_to_target"] is not None:
        figure = format_ratio(ratios["uplink_to_target"], spread["ratios"]["uplink_to_target"])
        lines.append(f"- Uplink bytes to the target: {REFERENCE} over {COMPARED} = **{figure}**.")
    for link, ratio in ratios["time_to_target"].items():
        if ratio is not None:
            figure = format_ratio(ratio, spread["ratios"]["time_to_target"][link])
            lines.append(f"- Time to the target on {link}: {REFERENCE} over {COMPARED} = **{figure}**.")
    if summary["target"] is None:
        lines.append("- No target is defined in every seed, so there are no figures to a target.")
    else:
        for name in methods:
            missed = [
                seed
                for seed, tree in summary["per_seed"].items()
                if tree["methods"][name]["uplink_bytes_to_target"] is None
            ]
            if missed:
                lines.append(f"- {name} missed the target in {len(missed)} of {len(summary['seeds'])} seeds.")
    if REFERENCE in methods and COMPARED in methods:
        lines.append(_final_sentence(summary))
    return "\n".join(line for line in lines if line)


def _final_sentence(summary: Mapping[str, Any]) -> str:
    reference, compared = (summary["methods"][name]["final_metric"] for name in (REFERENCE, COMPARED))
    if reference is None or compared is None:
        return ""
    gain = compared - reference if summary["higher_is_better"] else reference - compared
    verdict = "no worse" if gain == 0 else f"{abs(gain):.4f} {'better' if gain > 0 else 'worse'}"
    figures = f"{summary['metric']} {compared:.4f} against {reference:.4f}"
    return f"- After the last round {COMPARED} is {verdict} than {REFERENCE} ({figures})."


def _target(summary: Mapping[str, Any]) -> str:
    value = summary["target"]
    seeds = summary["seeds"]
    return (
        f"Target: {summary['target_rule']}. "
        + (f"Mean over seeds: {value:.4f}. " if value is not None else "It is not defined in every seed. ")
        + f"Seeds: {', '.join(map(str, seeds))}"
        + ("; ± is the sample standard deviation over them." if len(seeds) > 1 else " (one, so no spread).")
    )


def _table(summary: Mapping[str, Any]) -> str:
    links = list(summary["ratios"]["time_to_target"])
    head = ["method", "rounds", f"final {summary['metric']}", "uplink", "downlink", "uplink to target", "fewer bytes"]
    for link in links:
        head += [f"time to target, {link}", "faster"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, figures in summary["methods"].items():
        spread = summary["spread"]["methods"][name]
        line = [
            f"`{name}`",
            f"{figures['rounds']:g}",
            format_figure(figures["final_metric"], spread["final_metric"], digits=4),
            format_bytes(figures["uplink_bytes"]),
            format_bytes(figures["downlink_bytes"]),
            format_bytes(figures["uplink_bytes_to_target"]),
            format_ratio(_mean_ratio(summary, name, ("uplink_bytes_to_target",))),
        ]
        for link in links:
            line.append(format_seconds(figures["seconds_to_target"][link]))
            line.append(format_ratio(_mean_ratio(summary, name, ("seconds_to_target", link))))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean_ratio(summary: Mapping[str, Any], method: str, keys: Sequence[str]) -> float | None:
    """Reference over `method`, mean of the seeds' ratios as in `summary['ratios']`."""
    ratios = []
    for tree in summary["per_seed"].values():
        pair: list[Any] = [tree["methods"].get(REFERENCE), tree["methods"][method]]
        for key in keys:
            pair = [value and value[key] for value in pair]
        if not all(pair):
            return None
        ratios.append(pair[0] / pair[1])
    return fmean(ratios)


def _energy_table(rows: Sequence[Row]) -> str:
    """Joules per client and round, where the rows carry `energy: {link: {mean, straggler}}`."""
    if not any(row.get("energy") for row in rows):
        return ""
    lines = ["| energy per client and round | link | mean client | straggler |", "|---|---|---:|---:|"]
    for method, by_seed in curves(rows).items():
        trained = [row for series in by_seed.values() for row in series if row.get("energy")]
        for link in trained[0]["energy"]:
            means = (fmean(row["energy"][link][who] for row in trained) for who in ("mean", "straggler"))
            lines.append(f"| `{method}` | {link} | {' | '.join(f'{value:.2f} J' for value in means)} |")
    return "\n".join(lines)


def _caveats(recipe: Recipe) -> str:
    federation = recipe.federation
    lines = [
        "- Measured: every byte (packed messages and published adapters as files), every metric, and the seconds of "
        "local training where a link below says so.",
        "- Modelled: the links and the clock. No latency is added; a round lasts as long as the slowest client that "
        f"sends. {_packets(federation)} Bytes are totals over all clients.",
        *(f"- {_describe_link(link)}" for link in recipe.links),
        f"- Same for every method of a seed: the split ({federation.partition}"
        + (f", alpha {federation.alpha:g}" if federation.partition == "dirichlet" else "")
        + f", {federation.clients} clients), who is sampled ({federation.clients_per_round} a round), who drops out "
        f"(probability {federation.dropout:g}), the rates of the links, the initial adapter and the local steps.",
    ]
    return "\n".join(lines)


def _packets(federation: FederationSettings) -> str:
    if not federation.packet_loss:
        return "No packet is lost."
    return (
        f"Each transmission of a packet of {PACKET_BYTES} bytes is lost with probability {federation.packet_loss:g}; a "
        f"packet is repeated up to {federation.retransmissions} times, a message that lacks one is lost, and a "
        "round of which nothing arrives is sent again. Times and energy are of all bytes on the air, uplink bytes of "
        "each message once."
    )


def _describe_link(link: LinkProfile) -> str:
    rate = (
        f"every client {link.uplink_mbps:g} Mbit/s up"
        if not link.spread
        else (f"client rates log-normal around {link.uplink_mbps:g} Mbit/s up (spread {link.spread:g})")
    )
    if link.tail_fraction:
        low, high = link.tail_mbps
        rate += f", a share of {link.tail_fraction:g} on a slow tail of {low:g} to {high:g} Mbit/s"
    compute = (
        "local seconds as measured on the machine of this run"
        if link.compute_seconds is None
        else f"{link.compute_seconds:g} s of local compute for every client"
    )
    return (
        f"`{link.name}`: {rate}; downlink {link.downlink_ratio:g} times that; {compute}; {link.server_seconds:g} s of "
        f"server time a round; energy at {link.transmit_watts:g} W while sending, {link.compute_watts:g} W computing."
    )


def _plot_title(name: str) -> str:
    return next(title for stem, title in _PLOT_TITLES.items() if name.startswith(stem))

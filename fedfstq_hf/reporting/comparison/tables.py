"""The tables of a comparison as data, which the page and the Markdown report both print."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedfstq_hf.recipe.network import LinkProfile
from fedfstq_hf.reporting.comparison.figures import TIGHT, Comparison, Estimate, MethodFigures, Sweep
from fedfstq_hf.reporting.comparison.round_time import TRANSMIT_WATTS, mean_energy, mean_parts
from fedfstq_hf.reporting.comparison.runs import Run
from fedfstq_hf.reporting.comparison.workloads import settings_text
from fedfstq_hf.reporting.units import format_bytes, format_figure, format_ratio, format_seconds

NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows. `text_columns` are the further columns that hold words."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text_columns: Sequence[int] = ()


def figure_tables(comparison: Comparison) -> list[Table]:
    """Quality and traffic, bytes and time to the targets, energy; those without any figure are left out."""
    tables = [_traffic(comparison)]
    if comparison.targets:
        tables += [_to_targets(comparison, both_ways=False), _to_targets(comparison, both_ways=True)]
    if TIGHT in comparison.targets:
        tables.append(_time(comparison))
    if (breakdown := _breakdown(comparison)).rows:
        tables.append(breakdown)
    if any(figures.energy for figures in comparison.methods):
        tables.append(_energy(comparison))
    return tables


def target_name(comparison: Comparison, fraction: float) -> str:
    """`90 % (3.3829)`: the share and the metric, mean over seeds where they differ."""
    values = list(comparison.targets[fraction].values())
    return f"{100 * fraction:g} % ({sum(values) / len(values):.4f})"


def link_table(links: Sequence[LinkProfile]) -> Table:
    """The simulated links."""
    rows = []
    for link in links:
        rate = f"{link.uplink_mbps:g} Mbit/s"
        low, high = link.tail_mbps
        rows.append(
            [
                link.name,
                f"{rate}, every client" if not link.spread else f"log-normal around {rate}, spread {link.spread:g}",
                f"{100 * link.tail_fraction:g} % at {low:g}–{high:g} Mbit/s" if link.tail_fraction else NONE,
                f"{link.downlink_ratio:g} × uplink",
                "measured" if link.compute_seconds is None else f"{link.compute_seconds:g} s set",
                f"{link.server_seconds:g} s",
                f"{link.transmit_watts:g} / {link.compute_watts:g} W",
            ]
        )
    head = ["link", "uplink rate", "slow tail", "downlink", "local compute", "server", "sending / computing"]
    return Table("Links (modelled)", head, rows, text_columns=(1, 2, 4))


def run_table(runs: Sequence[Run]) -> Table:
    """The folders, how far each came, and the command and version that made it."""
    rows = [
        [
            str(run.folder),
            ", ".join(run.series),
            ", ".join(map(str, sorted({seed for by_seed in run.series.values() for seed in by_seed}))),
            _state(run),
            run.command or "not recorded",
            run.version or "not recorded",
        ]
        for run in runs
    ]
    note = "A run records the package's version, not its commit."
    return Table(
        "Runs", ["run", "methods", "seeds", "state", "command", "fedfstq_hf"], rows, note, text_columns=range(1, 6)
    )


def _state(run: Run) -> str:
    pairs = [(method, seed) for method in run.recipe.methods for seed in run.recipe.seeds]
    rounds = run.recipe.federation.rounds
    done = sum((run.rounds(method, seed) or 0) >= rounds for method, seed in pairs)
    return "finished" if done == len(pairs) else f"unfinished: {done} of {len(pairs)} methods and seeds done"


def _traffic(comparison: Comparison) -> Table:
    rounds = comparison.workload.recipe.federation.rounds
    rows = []
    for figures in comparison.methods:
        rows.append(
            [
                figures.label,
                settings_text(figures.method.settings),
                ", ".join(map(str, figures.series)),
                str(figures.rounds) if figures.finished else f"{figures.rounds} of {rounds}",
                format_figure(figures.final.mean, figures.final.spread, digits=4),
                with_spread(figures.uplink, format_bytes),
                with_spread(figures.downlink, format_bytes),
            ]
        )
    metric = comparison.workload.recipe.evaluation.metric
    better = "higher" if comparison.workload.recipe.evaluation.higher_is_better else "lower"
    return Table(
        "Quality and traffic",
        ["method", "settings", "seeds", "rounds", f"final {metric}", "uplink", "downlink"],
        rows,
        f"Bytes of all clients and rounds. Before training: "
        f"{format_figure(comparison.start.mean, comparison.start.spread, digits=4)}; {better} is better.",
        text_columns=(1, 2),
    )


def _to_targets(comparison: Comparison, *, both_ways: bool) -> Table:
    head = ["method"]
    for fraction in comparison.targets:
        head += [f"to {target_name(comparison, fraction)}", f"fewer than {comparison.reference}"]
    rows = []
    for figures in comparison.methods:
        row = [figures.label]
        for fraction in comparison.targets:
            reached = figures.reached[fraction]
            needed = (reached.total, reached.total_ratio) if both_ways else (reached.uplink, reached.uplink_ratio)
            row += [reached_text(needed[0], format_bytes, figures), ratio_text(needed[1])]
        rows.append(row)
    what = "Uplink and downlink" if both_ways else "Uplink"
    note = (
        f"{what} of all clients until a share of {comparison.reference}'s improvement is made and held in "
        f"{comparison.rule.consecutive} consecutive evaluations; in brackets the metric."
    )
    return Table(f"{'All' if both_ways else 'Uplink'} bytes to the targets", head, rows, note)


def _time(comparison: Comparison) -> Table:
    rows = []
    for link in comparison.links:
        for figures in comparison.methods:
            times = figures.reached[TIGHT].times[link]
            rows.append(
                [
                    f"{link}, {figures.label}",
                    reached_text(times.seconds, format_seconds, figures),
                    ratio_text(times.ratio),
                    NONE if times.floor.mean is None else with_spread(times.floor, format_seconds),
                    ratio_text(times.ceiling),
                    _percent(times.share),
                    _percent(times.reference_share),
                ]
            )
    reference = comparison.reference
    head = ["link, method", "time", "sooner", "time without traffic", "ceiling", "share of the ceiling"]
    note = (
        f"Sooner: {reference}'s time over the method's. Ceiling: {reference}'s time over the method's had nothing "
        f"weighed a byte in either direction, which is as far as compression can go in as many rounds. Share in "
        f"{reference}'s rounds: {reference}'s time without traffic over the method's time."
    )
    title = f"Simulated time to {target_name(comparison, TIGHT)}"
    return Table(title, [*head, f"share in {reference}'s rounds"], rows, note)


def _breakdown(comparison: Comparison) -> Table:
    recipe = comparison.workload.recipe
    rows = []
    for link in recipe.links:
        for figures in comparison.methods:
            parts = mean_parts(list(figures.series.values()), link, recipe.federation.clients)
            if parts is not None:
                cells = [f"{link.name}, {figures.label}", *map(format_seconds, (*parts, sum(parts)))]
                rows.append([*cells, f"{100 * parts[1] / sum(parts):.0f} %" if sum(parts) else NONE])
    head = ["link, method", "local compute", "uplink", "downlink", "server", "round", "uplink's share"]
    return Table("Where a round's time goes", head, rows, "Of the slowest client of each round; mean over rounds.")


def _energy(comparison: Comparison) -> Table:
    rows = []
    for link in comparison.workload.recipe.links:
        for figures in comparison.methods:
            if link.name in figures.energy:
                sweep = [mean_energy(list(figures.series.values()), link, watts) for watts in TRANSMIT_WATTS]
                cells = [NONE if joules is None else f"{joules:.2f} J" for joules in sweep]
                _, straggler = figures.energy[link.name]
                rows.append([f"{link.name}, {figures.label}", *cells, f"{straggler:.2f} J"])
    head = ["link, method", *(f"{watts:g} W sending" for watts in TRANSMIT_WATTS), "straggler"]
    note = (
        "Of the mean client at several powers while sending, of the straggler at the link's own. Modelled: sending and "
        "computing, not receiving."
    )
    return Table("Energy per client and round", head, rows, note)


def with_spread(value: Estimate, text_of: Callable[[float | None], str]) -> str:
    """A figure as `text_of` writes it, with its spread unless that is lost in the digits shown."""
    shown = value.mean is not None and value.spread is not None and value.spread > 5e-4 * abs(value.mean)
    return text_of(value.mean) + (f" ± {text_of(value.spread)}" if shown else "")


def reached_text(value: Estimate, text_of: Callable[[float | None], str], figures: MethodFigures) -> str:
    """What was needed to a target, or in how many seeds it was reached."""
    if value.mean is not None:
        return with_spread(value, text_of)
    if not value.count:
        return NONE
    if not value.known:
        return "not reached" if figures.finished else "not yet"
    return f"in {value.known} of {value.count} seeds"


def _percent(value: Estimate) -> str:
    return NONE if value.mean is None else f"{100 * value.mean:.0f} %"


def ratio_text(value: Estimate) -> str:
    """A ratio with its spread, a dash where a seed lacks it."""
    return format_ratio(value.mean, value.spread)


def overview(comparisons: Sequence[Comparison], sweeps: Sequence[Sweep]) -> Table | None:
    """One row for each workload and method; None for fewer than two workloads that have a target.

    Points of a sweep have tables of their own. Links are those whose local compute is set, where there are any: times
    on the others compare machines too.
    """
    points = {id(point) for sweep in sweeps for point in sweep.comparisons}
    shown = [one for one in comparisons if TIGHT in one.targets and id(one) not in points]
    if len(shown) < 2:
        return None
    links = {link.name: link for one in shown for link in one.workload.recipe.links}
    names = [name for name, link in links.items() if link.compute_seconds is not None] or list(links)
    metrics = {one.workload.recipe.evaluation.metric for one in shown}
    references = {one.reference for one in shown}
    reference = references.pop() if len(references) == 1 else "the reference"
    head = ["workload, method", "seeds", "uplink", f"fewer than {reference}", "both ways", f"fewer than {reference}"]
    head += [f"{name}, sooner" for name in names]
    head.append(f"final {metrics.pop() if len(metrics) == 1 else 'metric'}")
    rows = [_row(one, figures, names) for one in shown for figures in one.methods]
    note = (
        f"Sooner: {reference}'s time over the method's; in brackets the share of what zero bytes both ways would "
        f"give in as many rounds as {reference} needs."
    )
    return Table(f"To {100 * TIGHT:g} % of {reference}'s improvement", head, rows, note)


def _row(comparison: Comparison, figures: MethodFigures, links: Sequence[str]) -> list[str]:
    reached = figures.reached[TIGHT]
    cells = [f"{comparison.workload.name}, {figures.label}", str(len(figures.series))]
    cells += [reached_text(reached.uplink, format_bytes, figures), ratio_text(reached.uplink_ratio)]
    cells += [reached_text(reached.total, format_bytes, figures), ratio_text(reached.total_ratio)]
    for name in links:
        times = reached.times.get(name)
        if times is None or times.ratio.mean is None:
            cells.append(NONE)
        else:
            cells.append(f"{ratio_text(times.ratio)} ({_percent(times.reference_share)})")
    return [*cells, format_figure(figures.final.mean, figures.final.spread, digits=4)]


def sweep_tables(sweep: Sweep) -> list[Table]:
    """Where each method ended, and what it sent, at each value."""
    seeds = {len(figures.series) for member in sweep.comparisons for figures in member.methods}
    better = "higher" if sweep.comparisons[0].workload.recipe.evaluation.higher_is_better else "lower"
    note = f"{sweep.key} at the head of each column; {better} is better. "
    note += f"{_count(min(seeds))} each." if len(seeds) == 1 else f"{min(seeds)} to {_count(max(seeds))} each."
    head = ["method", *(f"{value:g}" for value in sweep.values)]
    final, uplink, ratios, totals = [], [], [], []
    for label in sweep.methods:
        found = [member.find(label) for member in sweep.comparisons]
        final.append([label, *(NONE if f is None else format_figure(f.final.mean, f.final.spread) for f in found)])
        uplink.append([label, *(NONE if f is None else with_spread(f.uplink, format_bytes) for f in found)])
        reached = [None if f is None else f.reached.get(TIGHT) for f in found]
        ratios.append([label, *(NONE if r is None else ratio_text(r.uplink_ratio) for r in reached)])
        totals.append([label, *(NONE if r is None else ratio_text(r.total_ratio) for r in reached)])
    tables = [Table(f"Final {sweep.metric}", head, final, note), Table("Uplink in total", head, uplink)]
    if any(cell != NONE for row in ratios for cell in row[1:]):
        reference = next(member.reference for member in sweep.comparisons if member.targets)
        for what, table in (("Uplink", ratios), ("Traffic both ways", totals)):
            title = f"{what} to {100 * TIGHT:g} % of {reference}'s improvement: times fewer bytes"
            tables.append(Table(title, head, table, f"{NONE}: not reached in every seed."))
    return tables


def _count(seeds: int) -> str:
    return f"{seeds} seed{'' if seeds == 1 else 's'}"

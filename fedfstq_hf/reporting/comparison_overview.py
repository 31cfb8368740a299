"""Several workloads in one table: what each method needed to the tight target, and where it ended."""

from collections.abc import Sequence

from fedfstq_hf.reporting.comparison_figures import TIGHT, Comparison, MethodFigures
from fedfstq_hf.reporting.comparison_sweep import Sweep
from fedfstq_hf.reporting.comparison_tables import NONE, Table, ratio_text, reached_text, reference_share_text
from fedfstq_hf.reporting.units import format_bytes, format_figure


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
    head = ["workload, method", "seeds", "uplink", f"fewer than {reference}"]
    head += [f"{name}, sooner" for name in names]
    head.append(f"final {metrics.pop() if len(metrics) == 1 else 'metric'}")
    rows = [_row(one, figures, names) for one in shown for figures in one.methods]
    note = (
        f"Sooner: {reference}'s time over the method's; in brackets the share of what messages of zero bytes would "
        f"give in as many rounds as {reference} needs."
    )
    return Table(f"To {100 * TIGHT:g} % of {reference}'s improvement", head, rows, note)


def _row(comparison: Comparison, figures: MethodFigures, links: Sequence[str]) -> list[str]:
    reached = figures.reached[TIGHT]
    cells = [f"{comparison.workload.name}, {figures.label}", str(len(figures.series))]
    cells += [reached_text(reached.uplink, format_bytes, figures), ratio_text(reached.uplink_ratio)]
    profiles = {link.name: link for link in comparison.workload.recipe.links}
    for name in links:
        if name not in profiles or reached.seconds_ratio[name].mean is None:
            cells.append(NONE)
        else:
            share = reference_share_text(comparison, reached, profiles[name])
            cells.append(f"{ratio_text(reached.seconds_ratio[name])} ({share})")
    return [*cells, format_figure(figures.final.mean, figures.final.spread, digits=4)]

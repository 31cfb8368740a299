"""What a reader must know about a comparison before its figures: what is missing, torn, paired or not comparable."""

from fedfstq_hf.recipe.network import PACKET_BYTES
from fedfstq_hf.reporting.comparison.figures import FRACTIONS, TIGHT, Comparison
from fedfstq_hf.reporting.comparison.summary import COMPARED, REFERENCE, metric_of
from fedfstq_hf.reporting.comparison.workloads import Workload, rounded_otherwise
from fedfstq_hf.reporting.units import format_ratio

CAVEATS = (
    "Measured: every byte (packed messages and published adapters as files), every metric, and, where the table of "
    "links says so, the seconds of local training on the machine of the run.",
    "Modelled: the links, the clock and the energy. No latency is added; a round lasts as long "
    "as the slowest client that sends. Seconds are simulated seconds, bytes are totals over all clients.",
    "The same for every method of a workload and seed: the split of the data, who is sampled, who drops out, the rates "
    "of the links, the initial adapter and the local steps.",
    "Mean ± sample standard deviation over seeds. A ratio is the mean of the seeds' own ratios, each against the "
    "reference of the same seed.",
)


def settings(workload: Workload) -> list[tuple[str, str]]:
    """The setting of a workload as (term, description) pairs."""
    recipe = workload.recipe
    federation, training = recipe.federation, recipe.training
    split = federation.partition + (f", alpha {federation.alpha:g}" if federation.partition == "dirichlet" else "")
    data = f"{recipe.data.path} (format {recipe.data.format}"
    data += f", subset {recipe.data.subset})" if recipe.data.subset else ")"
    seeds = sorted({seed for method in workload.methods.values() for seed in method.series})
    return [
        ("Model", f"{recipe.model}, {recipe.dtype}; LoRA rank {recipe.lora.r}"),
        ("Data", data),
        (
            "Clients",
            f"{federation.clients}, {federation.clients_per_round} a round, dropout {federation.dropout:g}, "
            f"packet loss {federation.packet_loss:g}",
        ),
        ("Split", split),
        ("Rounds", str(federation.rounds)),
        (
            "Local training",
            f"{training.local_steps} steps of {training.per_device_train_batch_size} examples, "
            f"learning rate {training.learning_rate:g}",
        ),
        ("Metric", f"{recipe.evaluation.metric} on held-out examples, every round"),
        ("Seeds", ", ".join(map(str, seeds))),
    ]


def findings(comparison: Comparison) -> list[str]:
    """What the method that every report compares saves to the tight target, and where it ends, beside the reference."""
    ours, reference = comparison.find(COMPARED), comparison.find(comparison.reference)
    if ours is None or reference is None or ours is reference:
        return []
    lines = []
    reached = ours.reached.get(TIGHT)
    if reached is not None and (ratio := reached.uplink_ratio).mean is not None:
        part = f"{100 * TIGHT:g} % of {reference.label}'s improvement"
        figure = format_ratio(ratio.mean, ratio.spread)
        total = format_ratio(reached.total_ratio.mean, reached.total_ratio.spread)
        lines.append(
            f"{ours.label} reaches {part} with {figure} fewer uplink bytes than {reference.label}, and {total} fewer "
            "in both directions together."
        )
        times = {link: time.ratio for link, time in reached.times.items() if time.ratio.mean is not None}
        sooner = [f"{format_ratio(time.mean, time.spread)} on {link}" for link, time in times.items()]
        lines += [f"It reaches it sooner by a factor of {_list(sooner)} (simulated time)."] if sooner else []
    end, base = ours.final.mean, reference.final.mean
    if ours.finished and reference.finished and end is not None and base is not None:
        recipe = comparison.workload.recipe
        gain = (end - base) * (1 if recipe.evaluation.higher_is_better else -1)
        verdict = "no worse" if gain == 0 else f"{abs(gain):.4f} {'better' if gain > 0 else 'worse'}"
        figures = f"{recipe.evaluation.metric} {end:.4f} against {base:.4f}"
        lines.append(f"After the last round {ours.label} is {verdict} than {reference.label} ({figures}).")
    return lines


def notes(comparison: Comparison) -> list[str]:
    """Sentences, the gravest first."""
    return [
        *_missing_target(comparison),
        *comparison.workload.apart,
        *_unfinished(comparison),
        *_seeds(comparison),
        *_runs(comparison.workload),
        *_own(comparison.workload),
        *_diverged(comparison),
    ]


def _missing_target(comparison: Comparison) -> list[str]:
    reference = comparison.find(comparison.reference)
    if reference is None:
        return [
            f"No targets and no ratios: no run here holds {REFERENCE}, or the method that its recipe takes for the "
            f"target. Add a run: fedfstq report ... DIR-WITH-{REFERENCE.upper()}"
        ]
    if not reference.finished:
        return [f"No targets and no ratios: {reference.label}, whose improvement sets them, has not finished."]
    lines = []
    if reference.label != REFERENCE:
        lines.append(f"No run here holds {REFERENCE}: targets and ratios refer to {reference.label}.")
    defined = comparison.targets.get(FRACTIONS[0], {})
    if lacking := [seed for seed in reference.series if seed not in defined]:
        lines.append(f"{reference.label} did not improve in seeds {_list(lacking)}: there is no target there.")
    for fraction, reached in reference.reached.items():
        if reached.uplink.known < reached.uplink.count:
            lines.append(
                f"{reference.label} itself holds its {100 * fraction:g} % target in {reached.uplink.known} of "
                f"{reached.uplink.count} seeds only (an evaluation that no later one confirms does not count): without "
                "its figure there is no ratio."
            )
    rules = {run.recipe.target.consecutive for run in comparison.workload.runs}
    if len(rules) > 1:
        lines.append(
            f"The runs ask for {_list(sorted(rules))} consecutive evaluations; {comparison.rule.consecutive} is used."
        )
    return lines


def _unfinished(comparison: Comparison) -> list[str]:
    rounds = comparison.workload.recipe.federation.rounds
    lines = []
    for figures in comparison.methods:
        short = {seed: rows[-1]["round"] for seed, rows in figures.method.series.items() if rows[-1]["round"] < rounds}
        if not short:
            continue
        where = ", ".join(f"seed {seed} after round {last} of {rounds}" for seed, last in sorted(short.items()))
        use = (
            "left out of the figures"
            if figures.finished
            else f"its figures are those after round {figures.rounds}, not final ones"
        )
        lines.append(f"{figures.label} is unfinished ({where}): {use}.")
    for run in comparison.workload.runs:
        pairs = [(method, seed) for method in run.recipe.methods for seed in run.recipe.seeds]
        if absent := [f"{method} seed {seed}" for method, seed in pairs if run.rounds(method, seed) is None]:
            lines.append(f"{run.folder} has not begun {_list(absent)}.")
    return lines


def _seeds(comparison: Comparison) -> list[str]:
    by_method = {figures.label: tuple(figures.series) for figures in comparison.methods}
    sets = set(by_method.values())
    if len(sets) > 1:
        each = "; ".join(f"{label} {_list(seeds)}" for label, seeds in by_method.items())
        return [f"Methods have different seeds ({each}): means are over each one's own, ratios over those shared."]
    if all(len(seeds) == 1 for seeds in sets):
        return [f"One seed ({_list(next(iter(sets)))}), so no spread: how much chance is in a figure is not known."]
    return []


def _runs(workload: Workload) -> list[str]:
    lines = [f"{run.folder}: the last line of its rows was torn and is left out." for run in workload.runs if run.torn]
    sources = {folder for method in workload.methods.values() for folder in method.sources.values()}
    measured = [link.name for link in workload.recipe.links if link.compute_seconds is None]
    if len(sources) > 1 and measured:
        lines.append(
            f"Local compute was measured, in {len(sources)} runs: times and energy on {_list(measured)} compare the "
            "machines and what else ran on them as well as the methods."
        )
    if loss := workload.recipe.federation.packet_loss:
        lines.append(
            f"Each transmission of a packet of {PACKET_BYTES} bytes is lost with probability {loss:g}; a packet is "
            f"repeated up to {workload.recipe.federation.retransmissions} times, a message that lacks one is lost, and "
            "a round of which nothing arrives is sent again. Times and energy count all bytes on the air, uplink bytes "
            "each message once."
        )
    if widest := rounded_otherwise(workload):
        seed, low, high = widest
        lines.append(
            f"Runs in bfloat16 on machines that round otherwise: seed {seed} measures {low:.5f} to {high:.5f} before "
            "training. It goes on in training, so a small difference between methods may be one between machines."
        )
    if variants := [method.label for method in workload.methods.values() if method.label != method.name]:
        lines.append(f"Runs use one name for different settings; told apart: {_list(variants)}.")
    return lines


def _own(workload: Workload) -> list[str]:
    """Which methods have another adapter or learning rate than the recipe's."""
    lines = []
    for run in workload.runs:
        for name, method in run.recipe.methods.items():
            own = [f"{key} {value}" for key, value in method.lora.items()]
            if method.learning_rate is not None:
                own.append(f"learning rate {method.learning_rate:g}")
            if own:
                lines.append(f"{name} has settings of its own in local training: {_list(own)}.")
    return list(dict.fromkeys(lines))


def _diverged(comparison: Comparison) -> list[str]:
    lines = []
    for figures in comparison.methods:
        seeds = [seed for seed, rows in figures.series.items() if any(metric_of(row) is None for row in rows)]
        if seeds:
            lines.append(f"{figures.label} has rounds whose metric is not a finite number, in seeds {_list(seeds)}.")
    return lines


def _list(items: object) -> str:
    return ", ".join(map(str, items))  # type: ignore[call-overload]

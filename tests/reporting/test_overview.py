"""The table of several workloads at the head of `fedfstq report`, checked by hand."""

from metric_rows import make_rows, write_run

from fedfstq_hf.reporting.comparison.figures import compare, find_sweeps
from fedfstq_hf.reporting.comparison.runs import read_runs
from fedfstq_hf.reporting.comparison.tables import overview
from fedfstq_hf.reporting.comparison.workloads import group_runs
from fedfstq_hf.reporting.run_report import write_report

FEDAVG = [4.0, 3.5, 3.2, 3.05, 3.0]  # 90 % of the improvement from round 3 on
LINKS = [
    {"name": "lte-20mbps", "uplink_mbps": 20, "compute_seconds": 1.0},
    {"name": "straggler-tail", "uplink_mbps": 20, "compute_seconds": 1.0},
]


def made(*folders):
    comparisons = [compare(workload) for workload in group_runs(read_runs(folders))]
    return overview(comparisons, find_sweeps(comparisons))


def two_workloads(home, **settings):
    rows = [*make_rows("fedavg", FEDAVG, bytes_per_round=2_000_000), *make_rows("fstq", FEDAVG, seconds=1.9)]
    one = write_run(home / "one", rows, name="one", description="one", **settings)
    rows = [*make_rows("fedavg", FEDAVG), *make_rows("fstq", [4.0, 3.9, 3.8, 3.7, 3.6])]
    other = {"data.max_length": 64, "training.local_steps": 3}  # two settings: no sweep
    return one, write_run(home / "two", rows, name="two", description="two", **other, **settings)


def test_a_line_for_each_workload_and_method(tmp_path):
    table = made(*two_workloads(tmp_path))
    links = ("lte-20mbps, sooner", "straggler-tail, sooner")
    assert table.title == "To 90 % of fedavg's improvement"
    needed = ("uplink", "fewer than fedavg", "both ways", "fewer than fedavg")
    assert table.head == ["workload, method", "seeds", *needed, *links, "final eval_loss"]
    lines = {row[0]: list(row[1:]) for row in table.rows}
    # Without traffic a round of fedavg, which takes 2 s on one link and 6 s on the other, is 1 s of compute.
    assert lines["one, fedavg"][:5] == ["1", "6.00 MB", "1.00×", "6.00 MB", "1.00×"]
    assert lines["one, fedavg"][5:7] == ["1.00× (50 %)", "1.00× (17 %)"]
    assert lines["one, fstq"][:5] == ["1", "300 B", "20000×", "3.30 kB", "1819×"]
    assert lines["one, fstq"][5:7] == ["1.05× (53 %)", "1.05× (18 %)"]
    assert lines["two, fstq"] == ["1", "not reached", "–", "not reached", "–", "–", "–", "3.6000"]


def test_links_whose_compute_was_measured_are_left_out_beside_those_where_it_is_set(tmp_path):
    links = [LINKS[0], {"name": "straggler-tail", "uplink_mbps": 20}]
    table = made(*two_workloads(tmp_path, links=links))
    assert [name for name in table.head if name.endswith("sooner")] == ["lte-20mbps, sooner"]


def test_one_workload_or_a_sweep_has_no_overview(tmp_path):
    rows = make_rows("fedavg", FEDAVG)
    one = write_run(tmp_path / "a", rows)
    assert made(one) is None
    assert made(one, write_run(tmp_path / "b", rows, **{"federation.alpha": 0.5})) is None


def test_page_and_text_begin_with_it(tmp_path):
    page, text = write_report(two_workloads(tmp_path), tmp_path / "page.html", command="c")
    assert page.read_text().index('<h2 id="overview">') < page.read_text().index('<h2 id="w1">')
    assert '<a href="#overview">' in page.read_text()
    written = text.read_text()
    assert written.index("## Overview") < written.index("| one, fstq | 1 | 300 B |") < written.index("### Quality")
    _, alone = write_report([tmp_path / "one"], tmp_path / "alone.html", command="c")
    assert "Overview" not in alone.read_text()

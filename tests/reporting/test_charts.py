"""The charts of a workload show the rows' figures."""

import pytest
from metric_rows import make_rows, write_run

from fedfstq_hf.reporting.comparison.figures import compare
from fedfstq_hf.reporting.comparison.plots import styles, workload_charts
from fedfstq_hf.reporting.comparison.runs import read_runs
from fedfstq_hf.reporting.comparison.workloads import group_runs

FEDAVG = [4.0, 3.5, 3.2, 3.05, 3.0]


def charts(folder, rows):
    (workload,) = group_runs(read_runs([write_run(folder / "run", rows)]))
    comparison = compare(workload)
    return {chart.name: chart for chart in workload_charts(comparison, styles([comparison]))}


def test_lines_are_the_rows_and_bands_the_spread_over_seeds(tmp_path):
    rows = [*make_rows("fedavg", FEDAVG, bytes_per_round=10_000), *make_rows("fstq", FEDAVG, seconds=1.0)]
    rows += make_rows("fedavg", [value + 0.02 for value in FEDAVG], seed=1, bytes_per_round=10_000)
    drawn = charts(tmp_path, rows)
    assert list(drawn) == [
        "quality_vs_uplink", "quality_vs_total", "quality_vs_time_lte-20mbps", "quality_vs_time_straggler-tail",
        "uplink_per_round", "downlink_per_round", "uplink_ratio", "total_ratio", "time_ratio_lte-20mbps",
        "time_ratio_straggler-tail",
    ]  # fmt: skip
    fedavg, fstq = drawn["quality_vs_uplink"].lines
    assert [x for x, _, _ in fedavg.points] == [10_000, 20_000, 30_000, 40_000]
    assert [y for _, y, _ in fedavg.points] == pytest.approx([3.51, 3.21, 3.06, 3.01])
    assert [spread for _, _, spread in fedavg.points] == pytest.approx([0.02 / 2**0.5] * 4)
    assert [(y, spread) for _, y, spread in fstq.points] == [(y, 0.0) for y in FEDAVG[1:]]
    assert [level.value for level in drawn["quality_vs_uplink"].levels] == pytest.approx([3.51, 3.26, 3.11, 4.01])
    time = drawn["quality_vs_time_lte-20mbps"]
    assert (time.lines[1].points[-1][0], time.x.log) == (4.0, False)
    assert [y for _, y, _ in drawn["uplink_per_round"].lines[1].points] == [100.0] * 4
    assert [y for _, y, _ in drawn["downlink_per_round"].lines[0].points] == [1000.0] * 4
    assert drawn["uplink_ratio"].lines[1].points == [(50, 100.0, 0.0), (75, 100.0, 0.0), (90, 100.0, 0.0)]
    assert drawn["time_ratio_straggler-tail"].lines[1].points[-1] == (90, 2.0, 0.0)


def test_what_diverged_lies_outside_and_the_title_says_so(tmp_path):
    rows = [*make_rows("fedavg", FEDAVG), *make_rows("fstq", [4.0, 9e9, 1e12, 1e15, 1e18])]
    chart = charts(tmp_path, rows)["quality_vs_uplink"]
    assert chart.y.limits == (None, 5.0)  # as far beyond the start as the best is before it
    assert "(what is far worse than before training lies outside)" in chart.title

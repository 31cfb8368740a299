"""A report of workloads that differ in one number: which they are, their tables, and the chart over that number."""

import xml.etree.ElementTree as ET

import pytest
from metric_rows import make_rows, write_run

from fedfstq_hf.reporting.comparison.figures import compare, find_sweeps
from fedfstq_hf.reporting.comparison.runs import read_runs
from fedfstq_hf.reporting.comparison.tables import sweep_tables
from fedfstq_hf.reporting.comparison.workloads import group_runs
from fedfstq_hf.reporting.run_report import write_report

ENDS = {0.0: (3.0, 3.1), 0.3: (3.2, 3.15), 0.7: (3.5, 3.25)}
"""fedavg's and fstq's loss at the end, by dropout."""


def write_sweep(home):
    for value, (fedavg, fstq) in ENDS.items():
        for seed in (0, 1):
            for method, end in (("fedavg", fedavg), ("fstq", fstq)):
                rows = make_rows(method, [4.0, 3.9, 3.8, 3.6, end + 0.1 * seed], seed=seed)
                name = f"drops, dropout={value}"
                write_run(home / f"{value}-{method}-{seed}", rows, name=name, **{"federation.dropout": value})
    return sorted(home.iterdir())


def find(folders):
    return find_sweeps([compare(workload) for workload in group_runs(read_runs(folders))])


def test_workloads_that_differ_in_one_number_are_a_sweep_in_its_order(tmp_path):
    (sweep,) = find(write_sweep(tmp_path)[::-1])
    assert (sweep.key, sweep.name) == ("federation.dropout", "drops")
    assert sweep.values == (0.0, 0.3, 0.7)
    assert set(sweep.methods) == {"fedavg", "fstq"}


def test_workloads_that_differ_in_two_settings_are_none(tmp_path):
    rows = make_rows("fedavg", [4.0, 3.5, 3.2, 3.05, 3.0])
    write_run(tmp_path / "a", rows)
    write_run(tmp_path / "b", rows, **{"federation.dropout": 0.3, "training.learning_rate": 1e-5})
    write_run(tmp_path / "c", rows, **{"training.bf16": True})  # in one, but not in a number
    assert find(sorted(tmp_path.iterdir())) == []


def test_tables_say_where_each_method_ended(tmp_path):
    folders = [path for path in write_sweep(tmp_path) if path.name != "0.7-fstq-1"]
    (sweep,) = find(folders)
    final, uplink, *_ = sweep_tables(sweep)
    assert final.head == ["method", "0", "0.3", "0.7"]
    rows = {row[0]: row[1:] for row in final.rows}
    assert rows["fedavg"] == ["3.050 ± 0.071", "3.250 ± 0.071", "3.550 ± 0.071"]
    assert rows["fstq"] == ["3.150 ± 0.071", "3.200 ± 0.071", "3.250"]
    assert final.note == "federation.dropout at the head of each column; lower is better. 1 to 2 seeds each."
    assert uplink.rows[0][1:] == ["400 B"] * 3


def test_a_method_that_is_missing_somewhere_has_a_dash_there(tmp_path):
    folders = [path for path in write_sweep(tmp_path) if not path.name.startswith("0.3-fstq")]
    (sweep,) = find(folders)
    assert {row[0]: row[2] for row in sweep_tables(sweep)[0].rows} == {"fedavg": "3.250 ± 0.071", "fstq": "–"}


def test_page_markdown_and_figure_show_it(tmp_path):
    page, text = write_report(
        write_sweep(tmp_path / "runs"), tmp_path / "page.html", command="c", plots=tmp_path / "plots"
    )
    assert "# drops: methods side by side" in text.read_text()
    head = "## drops, over federation.dropout\n\nEach value has a section of its own below.\n\n### Final eval_loss\n"
    assert head in text.read_text()
    html = page.read_text()
    assert html.index("drops, over federation.dropout") < html.index("drops, dropout=0.0")
    root = ET.parse(tmp_path / "plots" / "drops-over-federation-dropout-final_vs_federation-dropout.svg").getroot()
    words = " ".join(element.text or "" for element in root.iter() if element.tag.endswith("desc"))
    assert "fedavg 3.05 at 0, 3.25 at 0.3, 3.55 at 0.7" in words
    assert "fedavg: 0.3, 3.25 ± 0.07071" in [element.text for element in root.iter()]  # two seeds


@pytest.mark.parametrize("values", [(0.0,), (0.3, 0.3)])
def test_one_value_is_no_sweep(tmp_path, values):
    for number, value in enumerate(values):
        rows = make_rows("fedavg", [4.0, 3.5, 3.2, 3.05, 3.0], seed=number)
        write_run(tmp_path / f"{number}", rows, **{"federation.dropout": value})
    assert find(sorted(tmp_path.iterdir())) == []

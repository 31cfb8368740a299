"""A report's files: which are written where, and what is left alone; a run's own report is the same report."""

import subprocess
import sys

import pytest
from metric_rows import make_rows, write_run

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.reporting.run_report import write_report, write_run_report

FEDAVG = [4.0, 3.5, 3.2, 3.05, 3.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The figures of one workload with eleven methods, one of them named like markup."""
    home = tmp_path_factory.mktemp("figures")
    rows = make_rows("fedavg", FEDAVG, bytes_per_round=10_000)
    for number in range(10):
        name = f"method-{number}" if number else "</text><b>&m"
        rows += make_rows(name, [4.0, 3.6, 3.3, 3.1, 3.05], bytes_per_round=100 + number)
    write_run(home / "run", rows, name="../x<y")
    write_report([home / "run"], home / "page.html", command="c", plots=home / "plots")
    return home


def test_each_chart_of_the_page_is_a_file_named_after_it(folder):
    names = sorted(path.name for path in (folder / "plots").iterdir())
    assert len(names) == (folder / "page.html").read_text().count('class="chart"')
    assert "x-y-quality_vs_uplink.svg" in names
    assert "x-y-uplink_ratio.svg" in names


def test_the_text_shows_them_and_a_chart_is_ours_again(folder):
    text = (folder / "page.md").read_text()
    assert "](plots/x-y-quality_vs_uplink.svg)" in text
    chart = (folder / "plots" / "x-y-quality_vs_uplink.svg").read_text()
    assert chart.startswith("<!-- made by fedfstq report -->\n<svg ")
    assert "../x&lt;y: eval_loss against cumulative uplink" in chart
    write_report([folder / "run"], folder / "page.html", command="c", plots=folder / "plots")


def test_what_is_not_ours_is_left_alone(folder, tmp_path):
    taken = tmp_path / "plots"
    taken.write_text("mine")
    with pytest.raises(ConfigError, match="expected a folder for the plots"):
        write_report([folder / "run"], tmp_path / "page.html", command="c", plots=taken)
    assert not (tmp_path / "page.html").exists()
    theirs = tmp_path / "others" / "x-y-quality_vs_uplink.svg"
    theirs.parent.mkdir()
    theirs.write_text("<svg/>")
    with pytest.raises(ConfigError, match="was not made by `fedfstq report`"):
        write_report([folder / "run"], tmp_path / "page.html", command="c", plots=theirs.parent)
    assert theirs.read_text() == "<svg/>"


def run_rows():
    rows = []
    for seed in (0, 1):
        metrics = [value + 0.01 * seed for value in FEDAVG]
        rows += make_rows("fedavg", metrics, seed=seed, bytes_per_round=10_000)
        rows += make_rows("fstq", metrics, seed=seed, seconds=1.0)
        rows += make_rows("paper", [4.0 + 0.01 * seed, 3.9, 3.8, 3.7, 3.6], seed=seed)
    return rows


def test_a_run_s_own_report_says_what_was_found(tmp_path):
    run = write_run(tmp_path / "run", run_rows())
    command = "fedfstq simulate fed_med --seeds 2"
    text = write_run_report(run, command=command).read_text()
    assert f"```\n{command}\n```" in text
    assert "fstq reaches 90 % of fedavg's improvement with 100× ± 0 fewer uplink bytes than fedavg, and " in text
    assert "a factor of 2.00× ± 0.00 on lte-20mbps, 2.00× ± 0.00 on straggler-tail (simulated time)" in text
    assert "After the last round fstq is no worse than fedavg (eval_loss 3.0050 against 3.0050)." in text
    assert "| fedavg | codec fp32 | 0, 1 | 4 | 3.0050 ± 0.0071 | 40.0 kB | 4.00 kB |" in text
    assert "20 % at 0.5–2 Mbit/s" in text
    plots = ["quality_vs_uplink.png", "quality_vs_time_lte-20mbps.png", "quality_vs_time_straggler-tail.png"]
    assert all(f"]({name})" in text and (run / name).stat().st_size > 5000 for name in plots)
    assert "None" not in text
    assert "nan" not in text
    assert command in (run / "report.html").read_text()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    write_run_report(run, command=command)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    write_report([run], tmp_path / "all.html", command="c")  # the same tables, and the line that made the run
    tables = [line for line in text.splitlines() if line.startswith("| f")]
    assert set(tables) <= set((tmp_path / "all.md").read_text().splitlines())
    with pytest.raises(ConfigError, match=r"was not made by `fedfstq report`"):
        write_report([run], run / "report.html", command="c")


def test_worse_is_called_worse_and_a_run_without_the_reference_has_a_report(tmp_path):
    rows = [*make_rows("fedavg", [0.1, 0.7, 0.8, 0.9, 0.9]), *make_rows("fstq", [0.1, 0.6, 0.7, 0.7, 0.8])]
    better = {"metric": "exact_match"}
    text = write_run_report(write_run(tmp_path / "a", rows, **better), command="c").read_text()
    assert "fstq is 0.1000 worse than fedavg (exact_match 0.8000 against 0.9000)" in text
    text = write_run_report(write_run(tmp_path / "b", make_rows("fstq", FEDAVG)), command="c").read_text()
    assert "No targets and no ratios" in text
    assert "fstq reaches" not in text


def test_reports_survive_diverged_and_unfinished_runs(tmp_path):
    rows = [*make_rows("fedavg", FEDAVG), *make_rows("fstq", [4.0, None, None]), *make_rows("paper", [4.0])]
    assert write_run_report(write_run(tmp_path / "run", rows), command="c").exists()


def test_a_report_needs_no_torch(tmp_path):
    run = write_run(tmp_path / "run", make_rows("fedavg", FEDAVG))
    code = "import sys; from fedfstq_hf.reporting.run_report import write_run_report;"
    code += f"write_run_report({str(run)!r}, command='c'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

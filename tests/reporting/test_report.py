import json
import subprocess
import sys

import pytest
from metric_rows import make_rows

from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.reporting.comparison.summary import summarize, write_summary
from fedfstq_hf.reporting.plots import bytes_per_round, make_plots, quality_vs_time, quality_vs_uplink
from fedfstq_hf.reporting.run_report import render_report, write_report

FEDAVG = [4.0, 3.5, 3.2, 3.05, 3.0]
PLOTS = [
    "quality_vs_uplink.png",
    "quality_vs_time_lte-20mbps.png",
    "quality_vs_time_straggler-tail.png",
    "bytes_per_round.png",
]


def _rows(seeds: int = 2) -> list:
    rows = []
    for seed in range(seeds):
        rows += make_rows("fedavg", [value + 0.01 * seed for value in FEDAVG], seed=seed, bytes_per_round=10_000)
        rows += make_rows("fstq", [value + 0.01 * seed for value in FEDAVG], seed=seed, seconds=1.0)
        rows += make_rows("paper", [4.0, 3.9, 3.8, 3.7, 3.6], seed=seed)
    return rows


def _summary(rows: list) -> dict:
    return summarize(rows, metric="eval_loss", higher_is_better=False)


@pytest.fixture
def run_folder(tmp_path):
    rows = _rows()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.json").write_text(json.dumps(load_recipe("fed_med", {"seeds": 2}).to_dict()))
    write_summary(tmp_path / "summary.json", _summary(rows))
    return tmp_path


def test_report_says_what_was_found(run_folder):
    text = write_report(run_folder, command="fedfstq simulate fed_med --seeds 2").read_text()
    assert "fedfstq simulate fed_med --seeds 2" in text
    assert "fedavg over fstq = **100× ± 0**" in text
    assert "Time to the target on straggler-tail: fedavg over fstq = **2.00× ± 0.00**" in text
    assert "paper missed the target in 2 of 2 seeds" in text
    assert "fstq is no worse than fedavg" in text
    assert "| `fedavg` | 4 | 3.0050 ± 0.0071 | 40.0 kB | 4.00 kB | 30.0 kB | 1.00× |" in text
    assert "a slow tail of 0.5 to 2 Mbit/s" in text
    assert "alpha 0.1, 20 clients" in text
    assert "| `paper` | lte-20mbps | 4.00 J | 9.50 J |" in text
    assert all(f"]({name})" in text and (run_folder / name).stat().st_size > 5000 for name in PLOTS)
    assert "None" not in text
    assert "nan" not in text


def test_report_of_a_run_without_target():
    rows = make_rows("fstq", FEDAVG)
    text = render_report(rows, _summary(rows), load_recipe("fed_med"))
    assert "No target is defined" in text
    assert "(one, so no spread)" in text
    assert "| `fstq` | 4 | 3.0000 | 400 B | 4.00 kB | – | – |" in text


def test_worse_is_called_worse():
    rows = [*make_rows("fedavg", [0.1, 0.8, 0.9]), *make_rows("fstq", [0.1, 0.7, 0.8])]
    summary = summarize(rows, metric="exact_match", higher_is_better=True)
    text = render_report(rows, summary, load_recipe("fed_med"))
    assert "fstq is 0.1000 worse than fedavg (exact_match 0.8000 against 0.9000)" in text


def test_plots_are_the_same_bytes_every_time(tmp_path):
    rows = _rows()
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        assert [path.name for path in make_plots(rows, _summary(rows), folder)] == PLOTS
    for name in PLOTS:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_plots_show_the_curves_of_the_rows():
    rows = _rows(seeds=1)
    axes = quality_vs_uplink(rows, _summary(rows)).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["fedavg"].get_xdata()) == [10_000, 20_000, 30_000, 40_000]
    assert list(lines["fedavg"].get_ydata()) == FEDAVG[1:]
    assert axes.get_xscale() == "log"
    assert "100× fewer bytes" in [text.get_text() for text in axes.texts]
    time_axes = quality_vs_time(rows, _summary(rows), "lte-20mbps").axes[0]
    assert next(line for line in time_axes.get_lines() if line.get_label() == "fstq").get_xdata()[-1] == 4.0
    assert time_axes.get_xscale() == "linear"
    up, down = bytes_per_round(rows).axes
    assert list(next(line for line in up.get_lines() if line.get_label() == "fstq").get_ydata()) == [100.0] * 4
    assert list(down.get_lines()[0].get_ydata()) == [1000.0] * 4


def test_plots_survive_diverged_and_unfinished_runs(tmp_path):
    rows = [*make_rows("fedavg", FEDAVG), *make_rows("fstq", [4.0, None, None]), *make_rows("paper", [4.0])]
    assert len(make_plots(rows, _summary(rows), tmp_path)) == 4


def test_plotting_imports_matplotlib_late_and_leaves_pyplot_alone(run_folder):
    code = (
        "import sys; from fedfstq_hf.reporting.run_report import write_report; assert 'matplotlib' not in sys.modules;"
        f"write_report({str(run_folder)!r}); assert 'matplotlib.pyplot' not in sys.modules;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

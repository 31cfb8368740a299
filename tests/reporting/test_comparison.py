"""`fedfstq report`: what is merged, what is kept apart, and figures checked by hand."""

import json
import math
import shutil
import statistics

import pytest
from metric_rows import make_rows, write_run

from fedfstq_hf.cli import main
from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.recipe.network import LinkProfile, draw_rates, round_cost
from fedfstq_hf.reporting.comparison.figures import compare
from fedfstq_hf.reporting.comparison.findings import notes
from fedfstq_hf.reporting.comparison.round_time import mean_energy, mean_parts, seconds_without_traffic
from fedfstq_hf.reporting.comparison.runs import read_runs
from fedfstq_hf.reporting.comparison.summary import summarize
from fedfstq_hf.reporting.comparison.tables import figure_tables
from fedfstq_hf.reporting.comparison.workloads import group_runs
from fedfstq_hf.reporting.run_report import write_report

# fedavg improves from 4.0 to 3.0: targets 3.5, 3.25, 3.1, held from rounds 1, 2, 3 on.
FEDAVG = [4.0, 3.5, 3.2, 3.05, 3.0]
SLOW = [4.0, 3.9, 3.8, 3.7, 3.6]


def comparisons(*folders):
    return [compare(workload) for workload in group_runs(read_runs(folders))]


def table(comparison, start):
    return next(table for table in figure_tables(comparison) if table.title.startswith(start))


def line(comparison, start, method):
    return next(list(row) for row in table(comparison, start).rows if row[0] == method)


def test_methods_of_two_runs_merge_and_figures_are_those_of_the_summary(tmp_path):
    ours = [*make_rows("fedavg", FEDAVG, bytes_per_round=10_000), *make_rows("fstq", FEDAVG, seconds=1.0)]
    ours += make_rows("fedavg", [v + 0.01 for v in FEDAVG], seed=1, bytes_per_round=12_000)
    ours += make_rows("fstq", [4.01, 3.6, 3.3, 3.1, 3.05], seed=1, seconds=1.0)
    theirs = [row for seed in (0, 1) for row in make_rows("paper", SLOW, seed=seed)]
    theirs = [row | {"eval_loss": row["eval_loss"] + 0.01 * row["seed"]} for row in theirs]
    a, b = write_run(tmp_path / "a", ours), write_run(tmp_path / "b", theirs)
    (comparison,) = comparisons(a, b)
    assert [figures.label for figures in comparison.methods] == ["fedavg", "fstq", "paper"]
    summary = summarize([*ours, *theirs], metric="eval_loss", higher_is_better=False)
    for figures in comparison.methods:
        expected, spread = summary["methods"][figures.label], summary["spread"]["methods"][figures.label]
        assert (figures.final.mean, figures.final.spread) == (expected["final_metric"], spread["final_metric"])
        assert figures.reached[0.9].uplink.mean == expected["uplink_bytes_to_target"]
        assert {k: v.seconds.mean for k, v in figures.reached[0.9].times.items()} == expected["seconds_to_target"]
    fstq = comparison.find("fstq").reached[0.9]
    assert fstq.uplink_ratio.mean == summary["ratios"]["uplink_to_target"]
    assert fstq.times["straggler-tail"].ratio.mean == summary["ratios"]["time_to_target"]["straggler-tail"]
    # Seed 0: 50 % at round 1 in both. Seed 1: fedavg in round 1 (target 3.51), fstq in round 2.
    ratios = [10_000 / 100, 12_000 / 200]
    assert comparison.find("fstq").reached[0.5].uplink_ratio.mean == statistics.fmean(ratios)
    assert comparison.find("fstq").reached[0.5].uplink_ratio.spread == pytest.approx(statistics.stdev(ratios))
    assert line(comparison, "Uplink bytes", "fstq")[1:3] == ["150 B ± 70.7 B", "80.0× ± 28.3"]
    assert line(comparison, "Uplink bytes", "paper")[5:7] == ["not reached", "–"]
    assert line(comparison, "Quality", "fedavg")[4] == "3.0050 ± 0.0071"
    assert any("measured, in 2 runs" in note for note in notes(comparison))


def test_other_workloads_are_kept_apart_and_the_page_says_why(tmp_path):
    a = write_run(tmp_path / "a", make_rows("fedavg", FEDAVG))
    b = write_run(tmp_path / "b", make_rows("fstq", FEDAVG), alpha="0.5", model="other")
    c = write_run(tmp_path / "c", make_rows("fstq", [4.2, *FEDAVG[1:]]))
    d = write_run(tmp_path / "d", make_rows("paper", FEDAVG), name="renamed", description="else")
    first, second, third = comparisons(a, b, c, d)
    assert [figures.label for figures in first.methods] == ["fedavg", "paper"]
    assert (first.workload.name, second.workload.name, third.workload.name) == ("fed_med", "fed_med (2)", "fed_med (3)")
    (reason,) = second.workload.apart
    assert "model" in reason
    assert "other here" in reason
    assert "federation.alpha 0.1 there, 0.5 here" in reason
    assert "before training seed 0 measures 4 in" in third.workload.apart[0]
    assert any("Not compared with fed_med: same recipe, but" in note for note in notes(third))


def test_bfloat16_on_another_machine_is_the_same_workload_and_the_page_says_so(tmp_path):
    bf16 = {"training": {"bf16": True}}
    a = write_run(tmp_path / "a", make_rows("fedavg", FEDAVG), **bf16)
    b = write_run(tmp_path / "b", make_rows("fstq", [4.0004, *FEDAVG[1:]]), **bf16)
    c = write_run(tmp_path / "c", make_rows("paper", [4.004, *SLOW[1:]]), **bf16)
    first, second = comparisons(a, b, c)
    assert [figures.label for figures in first.methods] == ["fedavg", "fstq"]
    assert any("seed 0 measures 4.00000 to 4.00040 before training" in note for note in notes(first))
    assert first.find("fstq").reached[0.9].uplink_ratio.mean == 1.0
    assert "before training seed 0 measures 4 in" in second.workload.apart[0]
    same = write_run(tmp_path / "d", make_rows("paper", FEDAVG), **bf16)
    (alone,) = comparisons(a, same)
    assert not any("before training" in note for note in notes(alone))


def test_the_same_method_and_seed_twice(tmp_path):
    rows = make_rows("fedavg", FEDAVG)
    a = write_run(tmp_path / "a", rows)
    copy = write_run(tmp_path / "copy", rows[:3])
    (comparison,) = comparisons(copy, a, a, tmp_path / "a" / ".." / "a")
    assert comparison.find("fedavg").rounds == 4
    assert len(comparison.workload.runs) == 2
    again = write_run(tmp_path / "again", [row | {"compute_seconds": 2.0} for row in rows])
    with pytest.raises(DataError, match=r"both hold method fedavg, seed 0.*round 0: compute_seconds 0.0 and 2.0") as e:
        comparisons(a, again)
    assert "Leave one of the two folders out" in str(e.value)
    assert "--seeds '[1]'" in str(e.value)


def test_one_name_with_other_settings_is_another_method(tmp_path):
    a = write_run(tmp_path / "a", [*make_rows("fedavg", FEDAVG), *make_rows("fstq", FEDAVG)])
    options = json.loads((a / "recipe.json").read_text())["methods"]["fstq"] | {"uplink_budget": "0.7bpp"}
    b = write_run(tmp_path / "b", make_rows("fstq", SLOW), methods={"fstq": options})
    (comparison,) = comparisons(a, b)
    labels = [figures.label for figures in comparison.methods]
    assert labels == ["fedavg", "fstq", "fstq (uplink_budget 0.7bpp)"]
    assert any("told apart: fstq (uplink_budget 0.7bpp)" in note for note in notes(comparison))


def test_a_method_with_settings_of_its_own_in_local_training_is_named(tmp_path):
    a = write_run(tmp_path / "a", [*make_rows("fedavg", FEDAVG), *make_rows("fstq", FEDAVG)])
    assert not any("of its own" in note for note in notes(comparisons(a)[0]))
    options = json.loads((a / "recipe.json").read_text())["methods"]["fstq"]
    options |= {"lora": {"r": 2}, "learning_rate": 2e-3}
    b = write_run(tmp_path / "b", make_rows("fstq", SLOW), methods={"fstq": options})
    (comparison,) = comparisons(a, b)
    assert "fstq has settings of its own in local training: r 2, learning rate 0.002." in notes(comparison)


def test_unfinished_runs_missing_seeds_and_torn_lines_are_said(tmp_path):
    rows = [*make_rows("fedavg", FEDAVG), *make_rows("fedavg", FEDAVG, seed=1), *make_rows("fstq", FEDAVG)]
    rows += [*make_rows("fstq", FEDAVG[:3], seed=1), *make_rows("paper", FEDAVG[:3])]
    a = write_run(tmp_path / "a", rows, methods={"topk": {"codec": "topk", "uplink_budget": "0.2bpp"}})
    with (a / "metrics.jsonl").open("a") as file:
        file.write('{"method": "fst')
    (comparison,) = comparisons(a)
    fstq, paper = comparison.find("fstq"), comparison.find("paper")
    assert (list(fstq.series), fstq.finished) == ([0], True)
    assert (paper.rounds, paper.finished, paper.final.mean) == (2, False, 3.2)
    assert line(comparison, "Quality", "paper")[3] == "2 of 4"
    assert line(comparison, "Uplink bytes", "paper")[5] == "not yet"
    said = "\n".join(notes(comparison))
    assert "fstq is unfinished (seed 1 after round 2 of 4): left out of the figures." in said
    assert "paper is unfinished (seed 0 after round 2 of 4): its figures are those after round 2" in said
    assert "has not begun paper seed 1, topk seed 0, topk seed 1." in said
    assert "Methods have different seeds (fedavg 0, 1; fstq 0; paper 0)" in said
    assert "the last line of its rows was torn" in said


def test_without_fedavg_and_with_an_unfinished_one(tmp_path):
    a = write_run(tmp_path / "a", [*make_rows("paper", FEDAVG), *make_rows("fstq", FEDAVG)], **{"target.of": "paper"})
    (comparison,) = comparisons(a)
    assert comparison.reference == "paper"
    assert any("targets and ratios refer to paper" in note for note in notes(comparison))
    assert any("One seed (0), so no spread" in note for note in notes(comparison))
    (alone,) = comparisons(write_run(tmp_path / "b", make_rows("fstq", FEDAVG)))
    titles = ["Quality and traffic", "Where a round's time goes", "Energy per client and round"]
    assert [table.title for table in figure_tables(alone)] == titles
    assert "no run here holds fedavg" in notes(alone)[0]
    rows = [*make_rows("fedavg", FEDAVG[:3]), *make_rows("fstq", FEDAVG)]
    (early,) = comparisons(write_run(tmp_path / "c", rows))
    assert early.targets == {}
    assert "fedavg, whose improvement sets them, has not finished" in notes(early)[0]
    flat = [*make_rows("fedavg", [4.0] * 5), *make_rows("fstq", [4.0, math.nan, 4.0, 4.0, 4.0])]
    (still,) = comparisons(write_run(tmp_path / "d", flat))
    assert still.targets == {}
    assert "fedavg did not improve in seeds 0" in notes(still)[0]
    assert "fstq has rounds whose metric is not a finite number, in seeds 0." in notes(still)


def test_seconds_without_traffic_are_those_of_the_link_model_run_with_zero_bytes():
    link = LinkProfile("link", uplink_mbps=4.0, spread=0.6, tail_fraction=0.2, server_seconds=0.5)
    compute = {1: 2.0, 4: 5.0, 7: 3.0}
    nothing = dict.fromkeys(compute, 0)
    rates = draw_rates(link, 10, seed=1)
    zero = round_cost(link, rates, uplink_bytes=nothing, downlink_bytes=nothing, compute_seconds=compute).seconds
    row = {"seed": 1, "clients": list(compute), "client_compute_seconds": list(compute.values())}
    assert seconds_without_traffic([{}, row, row], link) == pytest.approx(2 * zero) == 11.0
    ratio = LinkProfile("link", compute_seconds=1.0, upload_ratio=10.0)
    assert seconds_without_traffic([{}, row, row], ratio) == 2.0


def test_who_could_send_no_preview_is_waited_for_neither_in_the_ceiling_nor_in_the_breakdown():
    """Client 1 is the slower one; in a round without refinements, sending nothing or not, it holds the round."""
    link = LinkProfile("link", uplink_mbps=8.0, downlink_ratio=1.0)
    row = breakdown_row(1, seconds=2.5) | {"client_air_bytes": [1_000_000, 0]}
    start = {"seconds": {"link": 0.0}, "seed": 0, "round": 0}
    refined = row | {"client_refinement_bytes": [2_000_000, 2_000_000]}
    assert seconds_without_traffic([start, row], link) == 3
    assert seconds_without_traffic([start, refined], link) == 1
    assert mean_parts([[start, row]], link, 2) == pytest.approx((3.0, 0.0, 1.0, 0.0))
    assert mean_parts([[start, refined]], link, 2) == pytest.approx((1.0, 1.0, 0.5, 0.0))


def breakdown_row(round, seconds):
    return {
        "seed": 0,
        "round": round,
        "seconds": {"link": seconds},
        "clients": [0, 1],
        "client_compute_seconds": [1.0, 3.0],
        "client_air_bytes": [1_000_000, 500_000],
        "client_downlink_bytes": [500_000, 1_000_000],
        "compute_seconds": 2.0,
        "energy": {"link": {"mean": 17.0, "straggler": 20.0}},
    }


def test_where_a_round_goes_by_hand():
    # At 8 Mbit/s up and 16 down, client 0 has 1 + 1 + 0.25 s, client 1 has 3 + 0.5 + 0.5 s and is the slowest.
    link = LinkProfile("link", uplink_mbps=8.0, downlink_ratio=2.0, server_seconds=0.25)
    rows = [breakdown_row(0, 0.0), breakdown_row(1, 4.25)]
    assert mean_parts([rows], link, 2) == pytest.approx((3.0, 0.5, 0.5, 0.25))
    assert mean_parts([rows[:1]], link, 2) is None
    # Rates that stand for a ratio: an upload of 4 MB takes ten times 0.4 s, so there are 8 Mbit/s again.
    ratio = LinkProfile("link", downlink_ratio=2.0, compute_seconds=0.4, upload_ratio=10.0, server_seconds=0.25)
    rows[0]["num_params"] = 1_000_000
    assert mean_parts([rows], ratio, 2) == pytest.approx((0.4, 1.0, 0.25, 0.25))


def test_energy_at_another_transmit_power_by_hand():
    # 17 J are 4 W * 2 s of computing and 9 J of sending at 2 W; at 5 W sending takes 22.5 J.
    rows = [breakdown_row(1, 0.0)]
    assert mean_energy([rows], LinkProfile("link"), 2.0) == pytest.approx(17.0)
    assert mean_energy([rows], LinkProfile("link"), 5.0) == pytest.approx(8.0 + 22.5)


def test_ceiling_in_the_table_by_hand(tmp_path):
    # Target in round 3 of 2 s each. Without traffic a round is 1 s of compute.
    rows = make_rows("fedavg", FEDAVG, bytes_per_round=2_000_000)
    (comparison,) = comparisons(write_run(tmp_path / "a", rows))
    cells = line(comparison, "Simulated time", "lte-20mbps, fedavg")
    assert cells[1:] == ["6.00 s", "1.00×", "3.00 s", "2.00×", "50 %", "50 %"]
    cells = line(comparison, "Simulated time", "straggler-tail, fedavg")
    assert cells[1:] == ["18.0 s", "1.00×", "3.00 s", "6.00×", "17 %", "17 %"]


def test_a_round_more_than_the_reference_counts_against_the_share_in_its_rounds(tmp_path):
    # Half of the improvement: fedavg in a round of 2 s, of which 1 s is uplink; the other in two rounds.
    rows = make_rows("fedavg", FEDAVG, bytes_per_round=2_000_000)
    rows += make_rows("fstq", [4.0, 3.9, 3.4, 3.2, 3.05], bytes_per_round=1_000_000)
    (comparison,) = comparisons(write_run(tmp_path / "a", rows))
    times = {figures.label: figures.reached[0.5].times["lte-20mbps"] for figures in comparison.methods}
    assert times["fstq"].share.mean == pytest.approx(2 / 4, rel=1e-3)
    assert times["fstq"].reference_share.mean == pytest.approx(1 / 4, rel=1e-3)
    assert times["fedavg"].reference_share == times["fedavg"].share


def test_bad_input_is_named(tmp_path):
    a = write_run(tmp_path / "runs" / "a", make_rows("fedavg", FEDAVG))
    with pytest.raises(ConfigError, match=r"There is no folder .*nowhere.*fedfstq simulate quickstart --out"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"its folders do. Type: fedfstq report .*runs/a"):
        read_runs([tmp_path / "runs"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no run; expected a folder"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="There is no run to report on"):
        read_runs([])
    with pytest.raises(DataError, match="without a single row"):
        read_runs([write_run(tmp_path / "young", [])])
    broken = write_run(tmp_path / "gap", [row for row in make_rows("fedavg", FEDAVG) if row["round"] != 2])
    with pytest.raises(DataError, match=r"gap/metrics.jsonl: method fedavg, seed 0 has rounds \[0, 1, 3, 4\]"):
        read_runs([broken])
    (a / "metrics.jsonl").write_text('{"method": "fedavg"}\n')
    with pytest.raises(DataError, match="line 1 lacks seed, round, metric"):
        read_runs([a])
    (a / "metrics.jsonl").write_text(json.dumps(make_rows("other", FEDAVG)[0]) + "\n")
    with pytest.raises(DataError, match="line 1 is of method 'other'; expected one of the recipe beside it: fedavg"):
        read_runs([a])
    (a / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not text"):
        read_runs([a])
    (a / "recipe.json").write_text('{"nme": "x"}')
    with pytest.raises(ConfigError, match=r"recipe.json.*another version"):
        read_runs([a])
    (a / "recipe.json").unlink()
    with pytest.raises(ConfigError, match="holds no run"):
        read_runs([a])


def test_the_line_that_made_a_run_comes_from_its_report_or_its_ledger(tmp_path):
    run = write_run(tmp_path / "run", make_rows("fedavg", [4.0, 3.5]))
    assert read_runs([run])[0].command is None
    (run / "ledger.json").write_text('{"command": "python recipes/evaluation/run.py fed_med"}')
    assert read_runs([run])[0].command == "python recipes/evaluation/run.py fed_med"
    (run / "report.md").write_text("```\nfedfstq simulate fed_med\n```\n")
    assert read_runs([run])[0].command == "fedfstq simulate fed_med"
    (run / "report.md").unlink()
    for broken in ("{", "[]", '{"minutes": 3}'):
        (run / "ledger.json").write_text(broken)
        assert read_runs([run])[0].command is None


def test_the_command_and_what_it_leaves_alone(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", [*make_rows("fedavg", FEDAVG), *make_rows("fstq", FEDAVG)])
    (run / "report.md").write_text("# fed_med\n\ntext\n\n```\nfedfstq simulate fed_med --rounds 4\n```\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["report", "run"])
    assert stopped.value.code == 0
    assert "Wrote report.html and report.md." in capsys.readouterr().out
    first = {name: (tmp_path / name).read_bytes() for name in ("report.html", "report.md")}
    text = first["report.md"].decode()
    assert "fedfstq report run --out report.html" in text
    assert "| run | fedavg, fstq | 0 | finished | fedfstq simulate fed_med --rounds 4 | not recorded |" in text
    write_report(["run"], "report.html", command="fedfstq report run --out report.html")
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    before = (run / "report.md").read_bytes()
    with pytest.raises(ConfigError, match=r"report.md exists and was not made by .*--out run/comparison.html"):
        write_report(["run"], "run/report.html", command="")
    assert (run / "report.md").read_bytes() == before
    assert not (run / "report.html").exists()
    with pytest.raises(ConfigError, match=r"--out is page.txt; expected the name of a page. Type --out page.html"):
        write_report(["run"], "page.txt", command="")
    shutil.rmtree(run)
    with pytest.raises(SystemExit) as stopped:
        main(["report", "run"])
    assert stopped.value.code == 2
    assert "There is no folder run" in capsys.readouterr().err

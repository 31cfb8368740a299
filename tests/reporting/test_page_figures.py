"""Charts as files of their own: well-formed SVG that needs nothing else, named after workload and chart."""

import xml.etree.ElementTree as ET

import pytest
from metric_rows import make_rows, write_run

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.reporting.chart import WIDTH
from fedfstq_hf.reporting.report import write_comparison

SVG = "{http://www.w3.org/2000/svg}"
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
    write_comparison([home / "run"], home / "page.html", command="c", plots=home / "plots")
    return home


def test_each_chart_of_the_page_is_a_file_named_after_it(folder):
    names = sorted(path.name for path in (folder / "plots").iterdir())
    assert len(names) == (folder / "page.html").read_text().count('class="chart"')
    assert "x-y-quality-against-cumulative-uplink.svg" in names
    assert "x-y-uplink-to-a-target-times-fewer-bytes-than-fedavg.svg" in names


def test_a_figure_needs_nothing_else(folder):
    for path in (folder / "plots").iterdir():
        text = path.read_text(encoding="utf-8")
        root = ET.fromstring(text)
        assert {element.tag.removeprefix(SVG) for element in root.iter() if isinstance(element.tag, str)} <= {
            "svg", "style", "rect", "text", "path", "g", "title", "desc", "clipPath"
        }  # fmt: skip
        assert "--s0" in root.find(f"{SVG}style").text
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_title_and_legend_are_in_the_figure(folder):
    root = ET.parse(folder / "plots" / "x-y-quality-against-cumulative-uplink.svg").getroot()
    height = float(root.get("height"))
    texts = {element.text: element for element in root.findall(f"{SVG}text")}
    assert "../x<y: quality against cumulative uplink" in texts
    for label in ("fedavg", "</text><b>&m", *(f"method-{number}" for number in range(1, 10))):
        assert float(texts[label].get("x")) + 5 * len(label) < WIDTH
        assert float(texts[label].get("y")) < height


def test_what_is_not_ours_is_left_alone(folder, tmp_path):
    taken = tmp_path / "plots"
    taken.write_text("mine")
    with pytest.raises(ConfigError, match="expected a folder for the plots"):
        write_comparison([folder / "run"], tmp_path / "page.html", command="c", plots=taken)
    assert not (tmp_path / "page.html").exists()
    theirs = tmp_path / "others" / "x-y-quality-against-cumulative-uplink.svg"
    theirs.parent.mkdir()
    theirs.write_text("<svg/>")
    with pytest.raises(ConfigError, match="was not made by `fedfstq report`"):
        write_comparison([folder / "run"], tmp_path / "page.html", command="c", plots=theirs.parent)
    assert theirs.read_text() == "<svg/>"
    write_comparison([folder / "run"], folder / "page.html", command="c", plots=folder / "plots")  # again over its own

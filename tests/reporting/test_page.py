"""The page: one file that needs nothing else, whose charts are where the rows say, whatever the texts in a run."""

import html.parser
import re
from itertools import pairwise

import pytest
from metric_rows import make_rows, write_run

from fedfstq_hf.reporting.run_report import write_report

FEDAVG = [4.0, 3.5, 3.2, 3.05, 3.0]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(html.parser.HTMLParser):
    """Every element with its attributes; tags must close in order."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def find(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of two workloads, one with two seeds and ten methods, and with hostile texts."""
    folder = tmp_path_factory.mktemp("page")
    rows = []
    for seed in (0, 1):
        rows += make_rows("fedavg", [v + 0.02 * seed for v in FEDAVG], seed=seed, bytes_per_round=10_000)
        for number in range(9):
            name = f"m{number}" if number else "</script><b>&m|0"
            rows += make_rows(name, [4.0 + 0.02 * seed, 3.6, 3.3, 3.1, 3.05], seed=seed, bytes_per_round=100 + number)
    rows += make_rows("wild", [4.0, 9e9, 1e12, 1e15, 1e18])
    a = write_run(folder / "a", rows, description='A "quoted" <img src=http://example.org/x.png> text', name="x<y")
    b = write_run(folder / "b", make_rows("fstq", FEDAVG), metric="exact_match")
    path, markdown = write_report([a, b], folder / "page.html", command="fedfstq report 'a b' <c>")
    text = path.read_text()
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return text, reader, markdown.read_text()


def test_the_page_needs_nothing_else(page):
    text, reader, _ = page
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "form", "b"}
    for _, attributes in reader.elements:
        assert not set(attributes) & {"src", "srcset", "xlink:href", "onclick", "onload"}
        assert attributes.get("href", "#").startswith("#")
        assert "url(" not in attributes.get("style", "")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)  # none of a chart's own, which would be all the page's
    assert "@import" not in style
    assert "url(" not in style
    assert "@media print" in style
    assert "@media screen and (prefers-color-scheme: dark)" in style


def test_hostile_texts_stay_texts(page):
    text, reader, markdown = page
    assert "</script><b>&m|0" in "".join(reader.texts)
    assert "</script>" not in text
    assert 'A "quoted" <img src=http://example.org/x.png> text' in "".join(reader.texts)
    assert r"\<img src=http://example.org/x.png\>" in markdown
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("| ")]
    assert len(set(widths[:12])) == 1  # a bar in a name does not make a column


def test_the_page_can_be_navigated(page):
    _, reader, _ = page
    assert reader.find("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert all(attributes.get("scope") in ("col", "row") for attributes in reader.find("th"))
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in reader.elements:
        for reference in attributes.get("aria-labelledby", "").split():
            assert reference in ids
        if attributes.get("href"):
            assert attributes["href"][1:] in ids
        assert attributes.get("clip-path", "")[5:-1] in [*ids, ""]
    charts = [attributes for attributes in reader.find("svg") if attributes.get("class") == "chart"]
    assert len(charts) == 10 + 6  # without a target there are no ratios
    assert all(attributes["role"] == "img" for attributes in charts)


def test_figures_are_on_the_page_and_say_what_is_outside(page):
    _, reader, _ = page
    texts = "".join(reader.texts)
    assert "3.0100 ± 0.0141" in texts  # fedavg: 3.00 and 3.02
    assert "fedavg ends at 3.0100 after 40.0 kB" in texts
    assert "(what is far worse than before training lies outside)" in texts
    assert "None" not in texts
    assert not re.search(r"\bnan\b|\binf\b", texts.lower())


def test_every_method_is_in_the_legend_of_every_chart(page):
    text, _, _ = page
    charts = re.findall(r"<svg.*?</svg>", text, re.S)
    assert all(f">{name}</text>" in chart for chart in charts[:8] for name in ("fedavg", "m1", "wild"))

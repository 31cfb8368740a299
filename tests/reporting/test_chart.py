"""The chart engine: points lie where the axes say, marks are few, the bytes are the same, names are names."""

import io
import math
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib

import pytest

from fedfstq_hf.reporting.chart import DARK, LIGHT, Axis, Chart, Level, Line, own_settings, style_sheet

SVG = "{http://www.w3.org/2000/svg}"


def chart(points, x=None, y=None, labels=("line",), levels=()):
    lines = [Line(label, number, points) for number, label in enumerate(labels)]
    return Chart("name", "title", "in words", x or Axis("x"), y or Axis("y"), lines, levels)


def markers(svg, number=0):
    """Where the markers of a line are, with the words shown on hovering."""
    group = next(node for node in ET.fromstring(svg).iter() if node.get("id") == f"k-marks{number}")
    uses = [node for node in group.iter() if node.tag.endswith("use")]
    return [(float(use.get("x")), float(use.get("y")), use[0].text) for use in uses]


def test_points_lie_where_the_axes_say():
    points = [(10.0, 1.0, 0.0), (100.0, 1.5, 0.0), (1000.0, 2.0, 0.0)]
    first, second, third = markers(chart(points, Axis("x", log=True)).svg("k"))
    assert second[0] == pytest.approx((first[0] + third[0]) / 2, abs=0.05)  # 100 is midway on a log axis
    assert second[1] == pytest.approx((first[1] + third[1]) / 2, abs=0.05)
    assert first[1] > third[1]  # up is larger
    assert [text for _, _, text in (first, third)] == ["line: 10, 1", "line: 1000, 2"]


def test_points_outside_the_limits_have_no_marker_and_of_many_points_some_have():
    points = [(float(i), float(i), 0.5) for i in range(100)]
    shown = markers(chart(points, y=Axis("y", limits=(None, 59.0))).svg("k"))
    assert [text for _, _, text in shown][:2] == ["line: 0, 0 ± 0.5", "line: 3, 3 ± 0.5"]
    assert shown[-1][2] == "line: 59, 59 ± 0.5"
    assert 20 <= len(shown) <= 30


@pytest.fixture
def settings():
    with own_settings():
        yield


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1.0, 2.0], [3.0], [44_500.0, 45_600.0], [1e-3, 1e9], [0.1, 0.9], [6.2, 48.0], []])
def test_ticks_are_few_and_within(values, log):
    figure = chart([(value, 1.0, 0.0) for value in values], Axis("x", log)).draw()
    low, high = figure.axes[0].get_xlim()
    ticks = [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high]
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert all(math.isfinite(tick) for tick in ticks)


@pytest.mark.usefixtures("settings")
def test_title_legend_and_level_names_are_within_the_figure_and_apart():
    labels = [f"method-{number}, with settings of its own" for number in range(11)] + ["_nolegend_", "$\\frac{$"]
    levels = [Level(1.0, "before\ntraining"), Level(1.4, "50 % target"), Level(1.41, "too close")]
    figure = chart([(1.0, 1.0, 0.1), (2.0, 2.0, 0.1)], labels=labels, levels=levels).draw()
    figure.draw_without_rendering()
    legend = figure.legends[0]
    assert [text.get_text().strip() for text in legend.get_texts()] == labels
    boxes = [text.get_window_extent() for text in (*figure.texts, *figure.axes[0].texts)]
    boxes += [legend.get_window_extent(), figure.axes[0].xaxis.label.get_window_extent()]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert [text.get_text() for text in figure.axes[0].texts] == ["before\ntraining", "50 % target"]


@pytest.mark.usefixtures("settings")
def test_forty_methods_look_different():
    figure = chart([(1.0, 1.0, 0.0), (2.0, 2.0, 0.0)], labels=[f"m{number}" for number in range(40)]).draw()
    handles = figure.legends[0].get_lines()
    looks = {(h.get_color(), h.get_marker(), str(h._dash_pattern), h.get_markerfacecolor()) for h in handles}
    assert len(looks) == len(handles) == 40


def test_the_png_is_small_opaque_and_carries_no_date_or_version():
    image = chart([(1.0, 1.0, 0.0), (2.0, 2.0, 0.0)]).png()
    stream, kinds = io.BytesIO(image), set()
    assert stream.read(8) == b"\x89PNG\r\n\x1a\n"
    while header := stream.read(8):
        (length,), kind = struct.unpack(">I", header[:4]), header[4:]
        body = stream.read(length)
        assert struct.unpack(">I", stream.read(4))[0] == zlib.crc32(kind + body)
        kinds.add(kind)
    assert kinds == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}
    assert 5_000 < len(image) < 100_000
    pixels = pytest.importorskip("PIL.Image").open(io.BytesIO(image)).convert("RGBA")
    assert (pixels.width, pixels.getpixel((0, 0))) == (1088, (255, 255, 255, 255))


def test_the_same_chart_gives_the_same_bytes_whatever_the_users_settings(monkeypatch):
    import matplotlib

    one = chart([(1.0, 1.0, 0.1), (2.0, 2.0, 0.1)], labels=["$a$", "b"])
    before = one.png(), one.svg("k", alone=True)
    for name, value in {"font.size": 30, "lines.markersize": 40, "svg.hashsalt": None, "svg.fonttype": "path"}.items():
        monkeypatch.setitem(matplotlib.rcParams, name, value)
    assert (one.png(), one.svg("k", alone=True)) == before


def test_an_svg_of_its_own_needs_nothing_else_and_names_stay_names():
    label = "</text><b>&m"
    text = chart([(1.0, 1.0, 0.1), (2.0, 2.0, 0.1)], labels=["fedavg", label]).svg("k", alone=True)
    root = ET.fromstring(text)
    assert {node.tag.removeprefix(SVG) for node in root.iter()} <= {
        "svg", "style", "defs", "use", "text", "path", "g", "title", "desc", "clipPath", "rect"
    }  # fmt: skip
    assert "--s0" in root.find(f"{SVG}style").text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert label in [node.text for node in root.iter(f"{SVG}text")]
    colors = re.findall("#[0-9a-f]{6}", re.sub("<style>.*?</style>", "", text, flags=re.S))
    assert set(colors) <= {"#000000"}  # all others are variables, light and dark
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("k-") for name in ids)
    for node in root.iter():
        assert node.get("href", "#k-title")[1:] in ids


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_colors_have_the_contrast_that_wcag_asks_for(colors):
    assert colors.keys() == LIGHT.keys()
    assert all(f"--{name}: {color};" in style_sheet() for name, color in colors.items())
    for name in ("ink", "soft", "link"):
        assert contrast(colors[name], colors["page"]) >= 4.5, name
        assert contrast(colors[name], colors["panel"]) >= 4.5, name
    for number in range(8):
        assert contrast(colors[f"s{number}"], colors["page"]) >= 3, number


def test_matplotlib_is_imported_late_and_pyplot_never():
    code = (
        "import sys, fedfstq_hf.reporting.run_report, fedfstq_hf.reporting.card.federation_card, fedfstq_hf.cli;"
        "assert 'matplotlib' not in sys.modules;"
        "from fedfstq_hf.reporting.chart import Axis, Chart, Line;"
        "Chart('n', 't', 'a', Axis('x'), Axis('y'), [Line('l', 0, [(1, 1, 0)])]).png();"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

from __future__ import annotations

import io
import struct
import zlib

import pytest
from card_inputs import make_history, make_metrics

from fedfstq_hf.federation.history import HistoryRow
from fedfstq_hf.reporting import card_plot
from fedfstq_hf.reporting.card_plot import curves, quality_vs_uplink


def chunks(png: bytes) -> list[bytes]:
    """Types of the chunks of a PNG whose checksums hold."""
    stream, types = io.BytesIO(png), []
    assert stream.read(8) == b"\x89PNG\r\n\x1a\n"
    while header := stream.read(8):
        (length,), kind = struct.unpack(">I", header[:4]), header[4:]
        body = stream.read(length)
        assert struct.unpack(">I", stream.read(4))[0] == zlib.crc32(kind + body)
        types.append(kind)
    return types


def test_points_stand_over_the_bytes_sent_so_far():
    assert curves(make_history(2), make_metrics(2)) == {"heldout": [(0, 3.62), (44_600, 3.58), (89_200, 3.54)]}


def test_a_line_per_source_and_only_of_the_main_metric():
    metrics = {round: {"b": {"eval_loss": 1.0, "accuracy": 0.5}, "a": {"eval_loss": 2.0}} for round in (1, 2)}
    metrics[2]["c"] = {"accuracy": 0.5}
    drawn = curves(make_history(2), metrics)
    assert list(drawn) == ["a", "b"]
    assert drawn["b"] == [(44_600, 1.0), (89_200, 1.0)]


@pytest.mark.parametrize(
    ("history", "metrics"),
    [
        (make_history(3), {}),
        (make_history(3), {2: {"heldout": {"eval_loss": 3.0}}}),
        (make_history(0), make_metrics(0)),
        ([], make_metrics(3)),
        (make_history(3)[:1], make_metrics(3)),
        ([HistoryRow(round, 0.0, 0, 0, 0, 1, 1) for round in range(3)], make_metrics(2)),
    ],
    ids=["no metrics", "one round", "round 0", "no history", "history too short", "no bytes"],
)
def test_where_there_is_nothing_to_plot_there_is_no_plot(history, metrics):
    assert curves(history, metrics) == {}
    assert quality_vs_uplink(history, metrics) is None


def test_the_image_is_small_and_carries_no_date_or_version():
    png = quality_vs_uplink(make_history(8), make_metrics(8))
    assert set(chunks(png)) == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}
    assert 5_000 < len(png) < 100_000


def test_the_ground_is_opaque_and_white():
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(quality_vs_uplink(make_history(3), make_metrics(3))))
    assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


@pytest.mark.parametrize("rounds", [1, 3, 200])
def test_axis_has_labels_for_few_and_for_many_bytes(rounds, monkeypatch):
    figures = []
    make = card_plot._figure
    monkeypatch.setattr(
        card_plot, "_figure", lambda *args, **kwargs: figures.append(make(*args, **kwargs)) or figures[-1]
    )
    quality_vs_uplink(make_history(rounds), make_metrics(rounds))
    axes = figures[0][1]
    low, high = axes.get_xlim()
    labelled = [axes.xaxis.get_major_formatter()(tick) for tick in axes.get_xticks() if low <= tick <= high]
    assert len(labelled) >= 2
    assert all(text.split()[1] in ("B", "kB", "MB") for text in labelled)


def test_odd_names_and_values_are_drawn():
    metrics = {round: {f"$x^{i}$ \n" * 20: {"_$": 1e300 * round} for i in range(9)} for round in range(3)}
    assert quality_vs_uplink(make_history(2), metrics) is not None

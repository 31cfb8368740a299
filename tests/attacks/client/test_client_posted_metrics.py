"""Metrics of a hostile client: extreme values, odd names, many of them; the round closes and the card is right."""

import json
import re
import warnings

import numpy
import pytest
import yaml
from light import found
from light_updates import ones, post

from fedfstq_hf.federation.mailbox import posted_metrics
from fedfstq_hf.federation.mailbox.posted_metrics import posted_losses
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.reporting.card import federation_card as card
from fedfstq_hf.reporting.card.federation_card import card_maker

pytestmark = pytest.mark.timeout(30)

GOOD = {"eval_loss": 2.5}
PNG = b"\x89PNG"


def put(mailbox, round, source, data):
    """As a client writes it that needs no `post_metric`."""
    folder = mailbox.path / "metrics" / f"{round:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{source}.json").write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


def two_rounds(mailbox):
    """Close a round and make a card with a plot, if there is something to plot."""
    coordinator = Coordinator(mailbox, card=card_maker("box"))
    for name in "ab":
        post(mailbox, name, ones(1))
    coordinator.serve(once=True)
    return coordinator.record.round


def readme(mailbox):
    return (mailbox.path / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def mailbox(tmp_path):
    return found(tmp_path / "box")


class Posting:
    """A mailbox in which somebody has posted these metrics."""

    def __init__(self, metrics):
        self.metrics = metrics

    def read_metrics(self, clients=()):
        return self.metrics


def read(metrics, up_to=1):
    return posted_metrics.read_metrics(Posting(metrics), up_to=up_to)


# What is believed


@pytest.mark.parametrize(
    "value",
    [1e308, -1e308, 1.1e30, float("nan"), float("inf"), 10**400, 2**53 + 1, True, None, "1", [1], {"a": 1}],
    ids=lambda value: repr(value)[:20],
)
def test_values_that_are_no_metric_are_left_out_and_counted(value, caplog):
    assert read({1: {"x": {"eval_loss": value, "good": 1}, "y": GOOD}}) == {1: {"x": {"good": 1.0}, "y": GOOD}}
    assert "1 posted metrics are left out" in caplog.text


@pytest.mark.parametrize("value", [0, -1, 2**53, 1e30, -1e30, 5e-324])
def test_values_in_bounds_are_taken_as_they_are(value):
    assert read({0: {"x": {"eval_loss": value}}}) == {0: {"x": {"eval_loss": value}}}


@pytest.mark.parametrize(
    "name", ["", " ", "a" * 65, "a\n", "\x1b[31m", "\u202egpj", "\ud800", "\x00", " a", "a\u2028b", 7], ids=repr
)
def test_names_that_cannot_be_shown_are_left_out(name):
    assert read({1: {"x": {name: 1.0, "good": 1.0}}}) == {1: {"x": {"good": 1.0}}}
    assert read({1: {name: GOOD, "y": GOOD}} if name != "a" * 65 else {1: {"a" * 130: GOOD, "y": GOOD}}) == {
        1: {"y": GOOD}
    }


def test_rounds_that_are_not_there_are_left_out():
    assert read({-1: {"x": GOOD}, 0: {"x": GOOD}, 2: {"x": GOOD}}) == {0: {"x": GOOD}}


def test_of_a_flood_the_first_by_name_are_taken():
    flood = {f"m{number:05}": 1.0 for number in range(20_000)}
    assert list(read({0: {"x": flood}})[0]["x"]) == [f"m{number:05}" for number in range(64)]
    sources = read({0: {f"s{number:03}": GOOD for number in range(999)}})[0]
    assert list(sources) == [f"s{number:03}" for number in range(256)]


def test_one_client_s_flood_takes_nobody_s_place():
    """On the Hub a source is named after its client, which the client cannot change."""
    posted = {f"s{number}@honest@evil": GOOD for number in range(999)} | {"test@honest": GOOD}
    kept = read({0: posted})[0]
    assert "test@honest" in kept
    assert len(kept) == 1 + posted_metrics.MAX_OF_CLIENT


def test_budgets_follow_believable_losses_only(mailbox):
    put(mailbox, 0, "x", {"eval_loss": 10**400})
    put(mailbox, 0, "y", b'{"eval_loss": 1e308}')
    put(mailbox, 0, "z", {"eval_loss": True})
    mailbox.post_metric(0, "good", {"eval_loss": 2.0})
    assert posted_losses(posted_metrics.read_metrics(mailbox, up_to=0)) == [(0, 2.0)]


# Files


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b"[1]",
        b"null",
        b'{"eval_loss": NaN}',
        b'{"eval_loss": 1e999}',
        b'{"eval_loss": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a": 1, "a": 2}',
        b'{"' + b"a" * 200_000 + b'": 1}',
        b'{"eval_loss": 1} trailing',
    ],
    ids=["empty", "binary", "list", "null", "nan", "overflow", "digits", "deep", "twice", "large", "trailing"],
)
def test_a_file_that_holds_no_metrics_is_left_out(mailbox, data, caplog):
    put(mailbox, 0, "x", data)
    mailbox.post_metric(0, "good", GOOD)
    assert two_rounds(mailbox) == 1
    assert "2.5000" in readme(mailbox)
    assert "metrics/000000/x.json" in caplog.text


# The card


NAMES = {
    "mathtext": r"$\frac{a}$$\undefined{",
    "half a formula": r"a $\frac{",
    "tex": r"\input{/etc/passwd}",
    "yaml": "x: [&a *a ]# !!python/object:os.system",
    "document": "---",
    "html": "<script>alert(1)</script>",
    "comment": "<!-- fedfstq:end -->",
    "link": "[click](http://elsewhere)",
    "image": "](http://elsewhere)![x](http://elsewhere",
    "table": "a | b | c",
    "code": "`` ` x",
    "jinja": "{{ card_data }}{% for %}",
    "wide": "\N{BALLOT BOX WITH CHECK}" * 64,
    "legend": "_nolegend_",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_is_a_name_wherever_the_card_shows_it(tmp_path, name, monkeypatch):
    box = found(tmp_path / "box")
    metrics = {round: {name: {name: 3.0 - round}, "plain": {name: 2.5 - round}} for round in (0, 1)}
    monkeypatch.setattr(type(box), "read_metrics", lambda self, clients=(): metrics)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Glyph")  # a font need not have every letter
        assert two_rounds(box) == 1
    text = readme(box)
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    (model,) = yaml.safe_load(head)["model-index"]
    shown = {result["metrics"][0]["type"].replace("&lt;", "<") for result in model["results"]}
    assert shown == {name.replace("`", "'")}
    assert sorted(result["metrics"][0]["value"] for result in model["results"]) == [1.5, 2.0]
    rows = [line for line in body.splitlines() if line.startswith("|") and "2.0000" in line]
    assert {line.count("|") for line in rows} <= {6, 10}
    outside = re.sub(r"`[^`\n]*`", "", body)  # of code spans, where markup means nothing
    assert "<script" not in outside
    assert "](http://elsewhere" not in outside
    assert body.count("<!-- fedfstq:end -->") == 1
    assert (box.path / card.PLOT_FILE).read_bytes().startswith(PNG)


def test_a_plot_takes_no_name_for_a_formula_or_for_tex(monkeypatch):
    """Where a user's matplotlib sets all text by TeX, too: that could read files."""
    import matplotlib

    from fedfstq_hf.federation.history import HistoryRow

    history = [HistoryRow(round, 0.0, 1, 100 * (round + 1), 1, 1, 1) for round in range(2)]
    metrics = {round: {r"$\frac{a": {r"\input{x} $\undefined{}$": 3.0 - round}} for round in range(2)}
    plain = card.quality_vs_uplink(history, metrics).png()
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setattr(
        "matplotlib.texmanager.TexManager.get_text_width_height_descent",
        lambda self, tex, *rest, **options: (_ for _ in ()).throw(AssertionError(tex)) if "input" in tex else (9, 9, 1),
    )
    monkeypatch.setattr("matplotlib.texmanager.TexManager.get_rgba", lambda *a, **k: numpy.zeros((9, 9, 4)))
    assert plain.startswith(PNG)
    assert card.quality_vs_uplink(history, metrics).png().startswith(PNG)


def test_extreme_but_allowed_values_make_a_card_and_a_plot(mailbox):
    for round, values in enumerate(([1e30, 5e-324, 1.0], [-1e30, 1e-320, 1.0 + 1e-16])):
        for number, value in enumerate(values):
            put(mailbox, round, f"s{number}", {"eval_loss": value})
    assert two_rounds(mailbox) == 1
    Coordinator(mailbox, card=card_maker("box"))
    assert "1.00e+30" in readme(mailbox)
    assert (mailbox.path / card.PLOT_FILE).read_bytes().startswith(PNG)


# What fails nonetheless


@pytest.mark.parametrize("error", [ValueError("odd"), RecursionError("deep"), MemoryError(), OverflowError("large")])
def test_a_plot_that_cannot_be_drawn_is_left_out_of_the_card(mailbox, monkeypatch, error, caplog):
    for round in (0, 1):
        put(mailbox, round, "x", {"eval_loss": 3.0 - round})

    def fail(*arguments):
        raise error

    monkeypatch.setattr(card, "quality_vs_uplink", fail)
    assert two_rounds(mailbox) == 1
    assert "3.0000" in readme(mailbox)
    assert card.PLOT_FILE not in readme(mailbox)
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("error", [ValueError("odd"), RecursionError("deep"), KeyError("x"), OSError(5, "disk")])
def test_a_card_that_cannot_be_made_holds_up_no_round(tmp_path, error, caplog):
    mailbox = found(tmp_path)
    (tmp_path / "README.md").write_bytes(b"as it was")

    def fail(facts):
        raise error

    coordinator = Coordinator(mailbox, card=fail)  # as at every start
    for name in "ab":
        post(mailbox, name, ones(1))
    assert coordinator.close_round().round == 1
    assert (tmp_path / "README.md").read_bytes() == b"as it was"
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == mailbox.read(1, "adapter_model.safetensors")
    assert "No card was made for round 1" in caplog.text
    assert "Traceback" in caplog.text


def test_metrics_that_cannot_be_read_hold_up_no_round_and_leave_the_card(tmp_path, monkeypatch, caplog):
    mailbox = found(tmp_path)

    def fail(clients=()):
        raise ValueError("odd \x1b[31m")

    monkeypatch.setattr(mailbox, "read_metrics", fail)
    coordinator = Coordinator(mailbox, card=lambda facts: {"README.md": b"card"})
    for name in "ab":
        post(mailbox, name, ones(1))
    assert coordinator.close_round().round == 1
    assert not (tmp_path / "README.md").exists()
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize("config", [b"", b"[" * 100_000, b"\xff", b"{]"])
def test_an_adapter_config_that_is_none_holds_up_no_round(tmp_path, config):
    mailbox = found(tmp_path)
    for path in (tmp_path / "rounds/000000/adapter_config.json", tmp_path / "adapter_config.json"):
        path.write_bytes(config)
    coordinator = Coordinator(mailbox, card=card_maker("box"))
    for name in "ab":
        post(mailbox, name, ones(1))
    assert coordinator.close_round().round == 1


@pytest.mark.parametrize(
    "existing",
    [b"x" * 2_000_000, b"---\n" + b"a: [" * 5000 + b"\n---\n", b"\xff\xfe\x00", b"---\n&a [*a]\n---\n", bytes(1000)],
    ids=["large", "deep", "binary", "alias", "zeros"],
)
def test_a_card_that_somebody_wrote_over_holds_up_no_round(mailbox, existing):
    (mailbox.path / "README.md").write_bytes(existing)
    assert two_rounds(mailbox) == 1


def test_metadata_of_a_card_that_would_take_minutes_to_read_are_moved_below_the_text(mailbox, monkeypatch):
    read, original = [], yaml.compose
    monkeypatch.setattr(yaml, "compose", lambda text, **options: read.append(len(text)) or original(text, **options))
    (mailbox.path / "README.md").write_text("---\nk: [" + "a," * 200_000 + "]\n---\nwritten by a person\n")
    assert two_rounds(mailbox) == 1
    assert max(read) < 10_000
    text = readme(mailbox)
    assert text.index("library_name: peft") < text.index("written by a person") < text.index("a,a,a,a")


def test_a_card_too_large_to_be_renewed_stays(mailbox, caplog):
    (mailbox.path / "README.md").write_bytes(b"x" * 2_000_000)
    assert two_rounds(mailbox) == 1
    assert (mailbox.path / "README.md").read_bytes() == b"x" * 2_000_000
    assert "The card is left as it is: README.md has 2000000 bytes" in caplog.text

"""One client of a folder mailbox leaves anything where its message belongs: the others' round closes."""

import os

import pytest
from light import found
from light_sharing import attachment
from light_updates import found_enrolled, ones, post
from planting import FILES, KINDS, odd_names

from fedfstq_hf.federation.server.coordinator import Coordinator

pytestmark = pytest.mark.timeout(20)


def closed(mailbox, **of_coordinator):
    """The round that a coordinator closes at once."""
    coordinator = Coordinator(mailbox, **of_coordinator)
    coordinator.serve(once=True)
    return coordinator.record


def accepted(record):
    return [entry.client_id for entry in record.accepted]


@pytest.mark.parametrize("enrolled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_left_out_and_named(tmp_path, kind, enrolled, caplog):
    mailbox = found_enrolled(tmp_path, "abx") if enrolled else found(tmp_path)
    for name in "ab":
        post(mailbox, name, ones(1))
    KINDS[kind](tmp_path / "updates/000000/x.safetensors")
    record = closed(mailbox)
    assert (record.round, accepted(record), record.refused) == (1, ["a", "b"], ())
    assert "updates/000000/x.safetensors" in caplog.text
    assert record.uplink_bytes == sum(entry.num_bytes for entry in record.accepted)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_message_is_refused_with_the_reason(tmp_path, kind):
    mailbox = found_enrolled(tmp_path, "abx")
    for name in "ab":
        post(mailbox, name, ones(1))
    FILES[kind](tmp_path / "updates/000000/x.safetensors")
    record = closed(mailbox)
    assert accepted(record) == ["a", "b"]
    assert [entry.client_id for entry in record.refused] == ["x"]
    assert record.refused[0].reason


def test_names_that_no_client_has_are_passed_over(tmp_path):
    mailbox = found(tmp_path)
    for name in "ab":
        post(mailbox, name, ones(1))
    odd_names(tmp_path / "updates/000000")
    assert accepted(closed(mailbox)) == ["a", "b"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["updates", "updates/000000"])
def test_instead_of_the_folder_it_waits_for_the_others(tmp_path, what, kind):
    """Nobody's message is there; as soon as the others post, theirs are."""
    mailbox = found(tmp_path)
    (tmp_path / what).parent.mkdir(exist_ok=True)
    KINDS[kind](tmp_path / what)
    coordinator = Coordinator(mailbox)
    coordinator.serve(once=True)
    assert coordinator.record.round == 0
    for name in "ab":
        post(mailbox, name, ones(1))
    coordinator.serve(once=True)
    assert accepted(coordinator.record) == ["a", "b"]


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "dangling link", "folder"])
def test_instead_of_a_refinement(tmp_path, kind):
    settings = {"codec": "fp32", "error_feedback": 0.0, "refinement_budget": 4000, "rounds": 3, "preview_step": 0.75}
    mailbox = found(tmp_path, **settings)
    coordinator = Coordinator(mailbox)
    for name in "ab":
        post(mailbox, name, ones(1))
    assert coordinator.close_round() is not None
    (tmp_path / "refinements/000000").mkdir(parents=True)
    KINDS[kind](tmp_path / "refinements/000000/b.safetensors")
    for name in "ab":
        post(mailbox, name, ones(1), round=1)
    record = closed(mailbox)
    assert (record.round, accepted(record)) == (2, ["a", "b"])


@pytest.mark.parametrize("kind", KINDS)
def test_instead_of_the_next_round(tmp_path, kind, caplog):
    mailbox = found(tmp_path)
    KINDS[kind](tmp_path / "rounds/000001")
    for name in "ab":
        post(mailbox, name, ones(1))
    record = closed(mailbox)
    assert (record.round, accepted(record)) == (1, ["a", "b"])
    assert mailbox.head() == 1
    assert "rounds/000001" in caplog.text


def test_odd_entries_among_the_rounds_are_no_rounds(tmp_path):
    mailbox = found(tmp_path)
    (tmp_path / "rounds/000007").mkdir()
    (tmp_path / "rounds/000008").mkdir()
    (tmp_path / "rounds/000008/round.json").write_bytes(b"{}")  # half-visible
    (tmp_path / "rounds/999999").write_bytes(b"")
    (tmp_path / "rounds/000009").symlink_to("000000")
    (tmp_path / f"rounds/{'9' * 200}").mkdir()
    assert mailbox.head() == 0
    for name in "ab":
        post(mailbox, name, ones(1))
    assert closed(mailbox).round == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["README.md", "history.jsonl", "adapter_model.safetensors"])
def test_instead_of_a_file_at_the_root(tmp_path, what, kind):
    """Neither read nor written through; it is replaced."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    mailbox = found(tmp_path / "box")
    path = mailbox.path / what
    path.unlink(missing_ok=True)
    if kind == "link to a file":
        path.symlink_to(victim)
    else:
        KINDS[kind](path)
    for name in "ab":
        post(mailbox, name, ones(1))
    seen = []
    record = closed(mailbox, card=lambda facts: seen.append(facts.existing_card) or {"README.md": b"card"})
    assert record.round == 1
    assert victim.read_bytes() == b"precious"
    assert b"precious" not in seen
    assert path.is_file()
    assert not path.is_symlink()
    assert (mailbox.path / "README.md").read_bytes() == b"card"


def test_a_lock_that_is_held_for_ever_holds_up_nobody(tmp_path, monkeypatch):
    from fedfstq_hf.federation import storage

    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.05, raising=False)
    mailbox = found(tmp_path)
    for name in "ab":
        post(mailbox, name, ones(1))
    import fcntl

    with open(tmp_path / "rounds/.lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # reading is enough for it
        assert closed(mailbox).round == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["metrics", "metrics/000000", "metrics/000000/x.json"])
def test_instead_of_metrics(tmp_path, what, kind):
    mailbox = found(tmp_path)
    (tmp_path / what).parent.mkdir(parents=True, exist_ok=True)
    KINDS[kind](tmp_path / what)
    if what.endswith(".json"):
        mailbox.post_metric(0, "good", {"eval_loss": 1.5})
    for name in "ab":
        post(mailbox, name, ones(1))
    seen = []
    record = closed(mailbox, card=lambda facts: seen.append(facts.metrics) or {})
    assert record.round == 1
    assert seen[-1] == ({0: {"good": {"eval_loss": 1.5}}} if what.endswith(".json") else {})


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        *((what, kind) for what in ("attachments", "attachments/x") for kind in KINDS),
        *(("attachments/x/saliency.safetensors", kind) for kind in (*KINDS, "sparse")),
    ],
)
def test_instead_of_an_attachment(tmp_path, what, kind):
    mailbox = found(tmp_path, rounds=1, share_saliency=True)
    if what != "attachments":
        for name in "abx":
            mailbox.post_attachment(name, "saliency.safetensors", attachment(mailbox, name, name.encode()))
        path = tmp_path / what
        if path.is_dir():
            os.unlink(path / "saliency.safetensors")
            path.rmdir()
        else:
            path.unlink()
    {**KINDS, "sparse": FILES["sparse"]}[kind](tmp_path / what)
    for name in "abx":
        post(mailbox, name, ones(1))
    seen = []
    record = closed(mailbox, saliency=lambda files: seen.append([data for data, _ in files]) or {})
    assert (record.finished, accepted(record)) == (True, ["a", "b", "x"])
    assert seen == ([] if what == "attachments" else [[b"a", b"b"]])

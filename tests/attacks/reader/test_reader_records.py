"""Public records of a sealed federation: what a reader learns of single clients' examples, weights and norms."""

import base64
import dataclasses
import json
from functools import partial

import pytest
import torch
from light import initial_state, make_spec
from light_updates import SIZE, make_message

from fedfstq_hf.codec import message
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import adapter_file, history, keys
from fedfstq_hf.federation.envelope import open_figures, seal_figures
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.record import FIGURES, RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.reporting.card.facts import fate
from fedfstq_hf.reporting.status import render_status

BOSS, OTHER = keys.KeyPair(b"\1" * 32), keys.KeyPair(b"\2" * 32)
EXAMPLES = {"a": 40013, "b": 80777, "c": 50021}
LEVELS = {"a": 1.0, "b": 2.0, "c": 1000.0}  # c is clipped


def run(path, *, sealed, rounds=3, new_coordinators=True):
    """Three rounds with refinements, each closed by a coordinator that was started for it."""
    mailbox = FolderMailbox(path, durable=False)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in initial_state().items()}
    spec = make_spec(
        rounds=4,
        min_clients=3,
        refinement_budget="1bpp",
        preview_step=0.5,
        error_feedback=0.0,
        clip=4.0,
        sealing_key=BOSS.seal_key if sealed else None,
        salt="s",
    )
    found_federation(mailbox, spec, adapter_file.dump(zeros), b"{}\n", now=0.0)

    def post(client_id, level, round, refinement):
        params = message.REFINEMENT_PARAMS if refinement else {}
        data = make_message(
            mailbox,
            client_id,
            torch.full((SIZE,), level),
            round=round,
            num_examples=EXAMPLES[client_id],
            params=params,
        )
        mailbox.post_update(round, client_id, keys.seal(BOSS.seal_key, data) if sealed else data, refinement=refinement)

    unseal = partial(keys.unseal, BOSS) if sealed else None
    for round in range(rounds):
        for client_id, level in LEVELS.items():
            post(client_id, level + round, round, False)
            if round:
                post(client_id, level + round - 0.5, round - 1, True)
        assert Coordinator(mailbox, unseal=unseal).close_round() is not None
    return mailbox


def record_of(mailbox, round):
    return RoundRecord.from_json(mailbox.read(round, "round.json"))


def test_no_file_tells_examples_weights_norms_or_scales(tmp_path):
    mailbox = run(tmp_path, sealed=True)
    records = [record_of(mailbox, round) for round in range(4)]
    assert [len(record.refinements) for record in records] == [0, 0, 3, 3]
    for record in records[1:]:
        entries = json.loads(record.to_json())
        for entry in (*entries["accepted"], *entries.get("refinements", ())):
            assert set(entry) == {"client_id", "sha256", "num_bytes"}
        opened = open_figures(record, partial(keys.unseal, BOSS))
        assert {entry.client_id: entry.num_examples for entry in opened.accepted} == EXAMPLES
        assert [entry.scale < 1 for entry in opened.accepted] == [False, False, True]
        secrets = {f"{getattr(e, name)}" for e in (*opened.accepted, *opened.refinements) for name in FIGURES}
        secrets = {secret for secret in secrets if len(secret) > 4} | {f"{sum(EXAMPLES.values())}"}
        assert len(secrets) > 8
        text = b"\n".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
        assert not [secret for secret in secrets if secret.encode() in text]


def test_totals_of_a_round_are_not_shown_either(tmp_path):
    mailbox = run(tmp_path, sealed=True)
    rows = history.load(mailbox.read_root("history.jsonl"))
    assert [(row.num_examples, row.clipped) for row in rows] == [(0, 0), *[(None, None)] * 3]
    assert "scaled down" not in fate(rows)
    assert "clipped" not in render_status(mailbox)

    plain = run(tmp_path / "plain", sealed=False)
    rows = history.load(plain.read_root("history.jsonl"))
    assert [(row.num_examples, row.clipped) for row in rows[1:]] == [(sum(EXAMPLES.values()), 1)] * 3
    assert "scaled down" in fate(rows)
    assert "clipped c" in render_status(plain)


def test_the_coordinator_reads_them_again_and_publishes_the_adapters_of_an_open_federation(tmp_path):
    sealed, plain = run(tmp_path / "sealed", sealed=True), run(tmp_path / "plain", sealed=False)
    for round in range(4):
        assert record_of(sealed, round).adapter_sha256 == record_of(plain, round).adapter_sha256
    opened = open_figures(record_of(sealed, 3), partial(keys.unseal, BOSS))
    expected = [dataclasses.astuple(entry)[3:] for entry in record_of(plain, 3).accepted]
    assert [dataclasses.astuple(entry)[3:] for entry in opened.accepted] == expected


def test_clients_still_find_what_became_of_their_message(tmp_path):
    record = record_of(run(tmp_path, sealed=True, rounds=1), 1)
    assert record.hides_figures
    for entry in record.accepted:
        assert record.fate(entry.client_id, entry.sha256) == entry


def test_without_the_key_no_round_is_refined(tmp_path):
    mailbox = run(tmp_path, sealed=True, rounds=1)
    coordinator = Coordinator(mailbox)
    with pytest.raises(MailboxError, match=r"weighed is sealed to x25519:[0-9a-f]{64}: start the coordinator with its"):
        coordinator.stop()
    assert coordinator.rollback(0).restored_from == 0  # for which nobody needs it


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda r, other: dataclasses.replace(r, sealed=other.sealed), "it is another record's"),
        (lambda r, other: dataclasses.replace(r, accepted=r.accepted[1:]), "cannot be opened"),
        (lambda r, other: dataclasses.replace(r, sealed=r.sealed[:-8]), "altered, or sealed to another key"),
        (lambda r, other: dataclasses.replace(r, sealed="no base64 ~"), "cannot be opened"),
        (lambda r, other: seal_figures(r, OTHER.seal_key), "sealed to another key"),
        (lambda r, other: dataclasses.replace(r, sealed=box(b"[" * 5000)), "cannot be"),
        (lambda r, other: dataclasses.replace(r, sealed=box(b"{}")), "cannot be opened"),
        (lambda r, other: dataclasses.replace(r, sealed=box(content(r, "x"))), "something else than figures"),
        (lambda r, other: dataclasses.replace(r, sealed=box(content(r, -1.0))), "something else than figures"),
        (lambda r, other: dataclasses.replace(r, sealed=box(content(r, True))), "something else than figures"),
    ],
)
def test_a_damaged_box_is_refused(tmp_path, damage, match):
    mailbox = run(tmp_path, sealed=True, rounds=2)
    record = damage(record_of(mailbox, 1), record_of(mailbox, 2))
    with pytest.raises(MailboxError, match=match):
        open_figures(record, partial(keys.unseal, BOSS))


def box(text):
    return base64.b64encode(keys.seal(BOSS.seal_key, text)).decode()


def content(record, value):
    rows = [[value] * len(FIGURES) for _ in record.accepted]
    return json.dumps({"accepted": rows, "refinements": [], "adapter": record.adapter_sha256}).encode()

"""A client's transaction: one message per round, and a residual that nothing loses."""

import dataclasses
import multiprocessing
import os
import time

import pytest
import torch
from failing_disk import fail_at
from light import SCHEMA, make_spec
from light_sessions import BASE, DELTA, SPEC, finish, make_session, record

from fedfstq_hf.codec import Schema, get_codec, message
from fedfstq_hf.errors import AdapterMismatchError, BudgetError, MailboxError, NonFiniteError, SessionBusyError
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.record import AcceptedUpdate, RefusedUpdate

SIZE = SCHEMA.num_params


def decoded(pending):
    _, payload = message.unpack(pending.message)
    return get_codec("topk").decode(payload, SCHEMA).to_dense()


def test_the_message_says_who_what_and_relative_to_what():
    pending = finish(make_session(), 3)
    header, _ = message.unpack(pending.message)
    assert (header.round, header.client_id, header.num_examples) == (3, "a", 5)
    assert (header.base, header.schema, header.codec) == (BASE, SCHEMA.fingerprint, "topk")
    assert len(pending.message) <= 300


def test_accepted_keeps_what_was_not_sent():
    session = make_session()
    pending = finish(session)
    settlement = session.settle(record(1, accepted=[pending]))
    assert settlement.outcome == "accepted"
    assert torch.equal(session.residual, DELTA - decoded(pending))
    assert 0 < session.residual_norm() < float(DELTA.norm())
    assert session.pending is None


@pytest.mark.parametrize("outcome", ["refused", "late"])
def test_otherwise_the_residual_is_what_it_was(tmp_path, outcome):
    session = make_session(tmp_path)
    session.settle(record(1, accepted=[finish(session)]))
    owed = session.residual.clone()
    pending = finish(session, 1, delta=3 * DELTA)
    assert torch.equal(session.residual, owed)
    settlement = session.settle(record(2, refused=[pending] if outcome == "refused" else []))
    assert (settlement.outcome, settlement.reason) == (outcome, "why not" if outcome == "refused" else "")
    assert torch.equal(session.residual, owed)
    session.close()
    again = make_session(tmp_path)
    assert torch.equal(finish(again, 2).corrected, DELTA + owed)  # the new change, not the old one beside it


def test_what_was_not_used_does_not_pile_up():
    session = make_session()
    for round in range(8):
        finish(session, round)
        session.settle(record(round + 1))
    assert session.residual is None
    assert torch.equal(finish(session, 8).corrected, DELTA)


def test_what_clipping_cut_off_is_not_owed():
    """A limit on what one client may do at once must not be paid out later."""
    session, clipped = make_session(), make_session()
    for each, scale in ((session, 1.0), (clipped, 0.25)):
        pending = finish(each)
        entry = AcceptedUpdate("a", pending.sha256, len(pending.message), 5, 1.0, 1.0, scale=scale)
        each.settle(dataclasses.replace(record(1), accepted=(entry,)))
    assert torch.equal(clipped.residual, DELTA - decoded(pending))
    assert torch.equal(clipped.residual, session.residual)


def test_a_record_that_names_other_bytes_of_this_client_is_late():
    session, other = make_session(), make_session()
    finish(session)
    named = record(1, accepted=[finish(other, delta=2 * DELTA)])
    assert session.decides(named)
    settlement = session.settle(named)
    assert (settlement.outcome, settlement.reason) == ("late", "another message of this client was there")
    assert session.residual is None


def test_which_records_decide_about_a_message():
    session = make_session()
    assert not session.decides(record(1))
    pending = finish(session)
    assert not session.decides(record(1))
    assert session.decides(record(2, refused=[pending]))
    assert session.decides(dataclasses.replace(record(2), restored_from=0))
    elsewhere = RefusedUpdate("a", "0" * 64, 9, "why not", round=4)
    assert not session.decides(dataclasses.replace(record(6), refused=(elsewhere,)))


def test_the_residual_is_part_of_the_next_update():
    session = make_session()
    first = finish(session)
    session.settle(record(1, accepted=[first]))
    second = finish(session, 1, delta=torch.zeros(SIZE))
    assert torch.equal(second.corrected, DELTA - decoded(first))
    session.settle(record(2, accepted=[second]))
    assert torch.allclose(session.residual, DELTA - decoded(first) - decoded(second), atol=1e-6)


def test_without_error_feedback_nothing_is_kept():
    session = make_session(spec=make_spec(codec="topk", error_feedback=0.0))
    for round, accepted in ((0, True), (1, False)):
        pending = finish(session, round)
        session.settle(record(round + 1, accepted=[pending] if accepted else []))
        assert session.residual is None
        assert torch.equal(pending.corrected, DELTA)


def test_a_residual_decays():
    session = make_session(spec=make_spec(codec="topk", error_feedback=0.5))
    session.settle(record(1, accepted=[finish(session)]))
    owed = session.residual.clone()
    assert torch.equal(finish(session, 1, delta=torch.zeros(SIZE)).corrected, 0.5 * owed)


def test_a_lossless_codec_leaves_no_residual():
    session = make_session(spec=make_spec(codec="fp32"))
    session.settle(record(1, accepted=[finish(session, max_bytes=None)]))
    assert session.residual is None


def test_a_round_is_finished_once():
    session = make_session()
    pending = finish(session, 2)
    with pytest.raises(MailboxError, match="'a' already finished round 2"):
        finish(session, 2)
    with pytest.raises(MailboxError, match="already finished"):
        finish(session, 3)  # the fate of round 2 is not known yet
    session.settle(record(3, accepted=[pending]))
    with pytest.raises(MailboxError, match="already finished"):
        finish(session, 2)
    finish(session, 3)


def test_only_the_record_of_a_later_round_settles():
    session = make_session()
    with pytest.raises(MailboxError, match="has no message that the record of round 1 settles"):
        session.settle(record(1))
    finish(session, 1)
    for round in (0, 1):
        with pytest.raises(MailboxError, match="has no message that"):
            session.settle(record(round))
    session.settle(record(3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("what", ["update", "Fisher information"])
def test_non_finite_numbers_are_refused_and_change_nothing(tmp_path, value, what):
    session = make_session(tmp_path)
    session.settle(record(1, accepted=[finish(session)]))
    before, bytes_before = session.residual.clone(), (tmp_path / "session.safetensors").read_bytes()
    bad = DELTA.clone()
    bad[7] = value
    arguments = {"delta": bad} if what == "update" else {"fisher": bad}
    with pytest.raises(
        NonFiniteError, match=f"The {what} of client 'a' in round 1 is NaN or infinite; nothing was sent"
    ):
        finish(session, 1, **arguments)
    assert session.pending is None
    assert session.last_round == 0
    assert torch.equal(session.residual, before)
    assert (tmp_path / "session.safetensors").read_bytes() == bytes_before
    finish(session, 1)


def test_an_impossible_budget_is_refused_and_changes_nothing(tmp_path):
    session = make_session(tmp_path)
    with pytest.raises(BudgetError, match=r"\d+ bytes"):
        finish(session, max_bytes=40)
    assert (session.pending, session.last_round) == (None, -1)
    assert not (tmp_path / "session.safetensors").exists()
    finish(session)


def test_a_budget_can_be_checked_before_training(tmp_path):
    session = make_session(tmp_path)
    with pytest.raises(
        BudgetError, match=r"An uplink budget of 200 bytes, \d+ of them for the message's header, is too small"
    ):
        session.check_budget(200)
    smallest = next(size for size in range(200, 400) if _fits(session, size))
    assert len(finish(session, max_bytes=smallest).message) <= smallest
    assert not _fits(make_session(spec=make_spec(codec="fp32")), 4 * SIZE)


def _fits(session, size):
    try:
        session.check_budget(size)
    except BudgetError:
        return False
    return True


def test_every_state_survives_a_restart(tmp_path):
    def restart(session):
        session.close()
        again = make_session(tmp_path)
        assert (again.last_round, again.settled_round) == (session.last_round, session.settled_round)
        assert again.carried.keys() == session.carried.keys()
        assert all(torch.equal(again.carried[name], session.carried[name]) for name in session.carried)
        assert (again.residual is None) == (session.residual is None)
        assert again.residual is None or torch.equal(again.residual, session.residual)
        assert (again.pending is None) == (session.pending is None)
        if session.pending is not None:
            assert again.pending.message == session.pending.message
            assert again.pending.round == session.pending.round
            assert torch.equal(again.pending.corrected, session.pending.corrected)
        return again

    session = restart(make_session(tmp_path))  # new
    finish(session, carried={"tokens.ema": torch.ones(3, dtype=torch.float64), "step": torch.tensor(4)})
    session = restart(session)  # pending
    session.settle(record(1, accepted=[session.pending]))
    assert session.residual is not None
    session = restart(session)  # idle, with a residual
    finish(session, 1, carried={"step": torch.tensor(5)})
    session = restart(session)  # pending, with a residual
    session.settle(record(2))
    assert session.residual is not None
    restart(session)


def test_a_restarted_session_packs_the_same_bytes(tmp_path):
    one, two = make_session(tmp_path / "one"), make_session(tmp_path / "two")
    for session in (one, two):
        session.settle(record(1, accepted=[finish(session)]))
    two.close()
    again = make_session(tmp_path / "two")
    assert finish(again, 1).message == finish(one, 1).message


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, call):
    session = ClientSession("a", SPEC, SCHEMA, folder=tmp_path)
    first = finish(session)
    with monkeypatch.context() as patch:
        fail_at(patch, call, 0)
        with pytest.raises(
            MailboxError, match=r"Could not write .*session\.safetensors: No space left.*nothing was lost"
        ):
            session.settle(record(1, accepted=[first]))
    assert session.pending is first
    session.settle(record(1, accepted=[first]))
    residual = session.residual.clone()
    with monkeypatch.context() as patch:
        fail_at(patch, call, 0)
        with pytest.raises(MailboxError, match="nothing was lost"):
            finish(session, 1)
    assert (session.pending, session.last_round) == (None, 0)
    assert torch.equal(session.residual, residual)
    finish(session, 1)
    assert sorted(os.listdir(tmp_path)) == ["session.lock", "session.safetensors"]


def test_state_of_another_client_federation_or_adapter_is_refused(tmp_path):
    session = make_session(tmp_path)
    finish(session)
    session.close()
    with pytest.raises(MailboxError, match=r"has client_id 'a', expected 'b': .* a state folder of its own"):
        make_session(tmp_path, client_id="b")
    with pytest.raises(MailboxError, match=r"has federation .*: it belongs to another client, federation"):
        make_session(tmp_path, spec=make_spec(codec="topk", rounds=9))
    other = Schema.from_state_dict({"x": torch.zeros(3)})
    with pytest.raises(MailboxError, match="has federation"):
        make_session(tmp_path, schema=other, spec=make_spec(codec="topk", schema=other.fingerprint))
    make_session(tmp_path).close()  # none of them kept the lock


def test_another_adapter_than_the_federation_s_is_refused():
    with pytest.raises(
        AdapterMismatchError, match=r"\(3 parameters here\)\. Build it from the federation's adapter_config"
    ):
        make_session(schema=Schema.from_state_dict({"x": torch.zeros(3)}))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x10\0\0\0\0\0\0\0{}              "])
def test_a_damaged_state_says_what_to_do(tmp_path, content):
    (tmp_path / "session.safetensors").write_bytes(content)
    with pytest.raises(MailboxError, match=r"cannot be read .* Restore it from a backup, or move it away to join"):
        make_session(tmp_path)


def test_leftovers_of_a_killed_client_are_cleaned(tmp_path):
    (tmp_path / ".tmp-session.safetensors-123-0123abcd").write_bytes(b"half")
    make_session(tmp_path)
    assert os.listdir(tmp_path) == ["session.lock"]


def _hold(folder, ready):
    session = make_session(folder)
    ready.set()
    time.sleep(60)
    session.close()


def test_two_processes_cannot_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(20)
    with pytest.raises(SessionBusyError, match=r"Another process uses .* Stop it first, or give this client another"):
        make_session(tmp_path)
    process.kill()  # a killed holder lets go
    process.join()
    make_session(tmp_path).close()
    make_session(tmp_path).close()


def test_in_memory_it_needs_no_folder():
    session = make_session()
    session.settle(record(1, accepted=[finish(session)]))
    assert session.residual is not None

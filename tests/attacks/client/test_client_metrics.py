"""Metrics that somebody forged: they must not steer what others send where messages need signatures."""

import pytest
from light import SCHEMA, fake_training, pause
from light_updates import SIZE, found_enrolled, ones, post

from fedfstq_hf.codec.budget import open_budget
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.client.participation import MailboxParticipation
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.control import Enrolment
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.reporting.status import render_status

ALICE, BOB = keys.KeyPair(b"\1" * 32), keys.KeyPair(b"\2" * 32)
FLAT = {"eval_loss": 3.0}  # progress that came to a stop: budgets grow to their upper bound


def sent_bytes(path, *, signatures, forged):
    """Size of the message of a client whose budget follows losses."""
    enrolled = {"a": Enrolment(verify_key=ALICE.verify_key), "b": Enrolment(verify_key=BOB.verify_key)}
    mailbox = found_enrolled(path, enrolled, codec="topk", rounds=9, min_clients=1, signatures=signatures)
    spec = FederationSpec.from_json(mailbox.read(0, "spec.json"))
    coordinator = Coordinator(mailbox)
    for round in range(8):  # metrics of rounds to come are not read
        post(mailbox, "b", ones(1), round=round, sign=keys.signer(BOB, spec.id), encoded_by="topk")
        assert coordinator.close_round() is not None
    for round in range(9 if forged else 0):
        mailbox.post_metric(round, "forged", {"eval_loss": 9.0} if round == 0 else FLAT)
    session = ClientSession("a", spec, SCHEMA, folder=None, sign=keys.signer(ALICE, spec.id))
    budget = open_budget("auto:500B..800B", SIZE)
    participation = MailboxParticipation(mailbox, session, budget=budget, sleep=pause)
    assignment = participation.next()
    participation.complete(assignment, fake_training(assignment.adapter, assignment.seed, {}))
    return len(session.pending.message), mailbox


@pytest.mark.parametrize("signatures", [True, False])
def test_forged_losses_steer_no_budget_where_messages_are_signed(tmp_path, signatures):
    own, _ = sent_bytes(tmp_path / "own", signatures=signatures, forged=False)
    steered, _ = sent_bytes(tmp_path / "forged", signatures=signatures, forged=True)
    assert (steered > own) == (not signatures)
    assert own <= 500


@pytest.mark.parametrize(
    ("signatures", "shown"), [(True, "[unsigned: forged eval_loss 3.0000]"), (False, "[forged eval_loss 3.0000]")]
)
def test_a_status_marks_them(tmp_path, signatures, shown):
    mailbox = found_enrolled(tmp_path, "ab", signatures=signatures)
    mailbox.post_metric(0, "forged", FLAT)
    assert shown in render_status(mailbox)

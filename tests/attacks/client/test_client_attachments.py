"""Attachments of others: replaced, replayed, renamed or swapped, by whoever can write where they lie."""

import pytest
from light import found
from light_sharing import Joining, attachment, spec_of, take_part
from light_updates import delta, found_enrolled, make_message

from fedfstq_hf.codec import message
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.control import Enrolment
from fedfstq_hf.federation.mailbox.protocol import SALIENCY_FILE
from fedfstq_hf.federation.server import attachments

ALICE, BOB, BOSS = (keys.KeyPair(bytes([seed]) * 32) for seed in (1, 2, 3))
SIGNED = {"a": Enrolment(verify_key=ALICE.verify_key), "b": Enrolment(verify_key=BOB.verify_key)}
SHARED = {"rounds": 1, "min_clients": 2, "share_saliency": True}


def signed_federation(path, **changes):
    """Both clients took part and shared; nothing is closed yet."""
    mailbox = found_enrolled(path, SIGNED, **SHARED, signatures=True, **changes)
    take_part(mailbox, "a", b"table of a", ALICE)
    take_part(mailbox, "b", b"table of b", BOB)
    return mailbox


def test_what_was_shared_is_joined_and_counted(tmp_path):
    joining = Joining(mailbox := signed_federation(tmp_path))
    record = joining.close_round()
    assert joining.seen == [b"table of a", b"table of b"]
    lying = [(tmp_path / "attachments" / client / SALIENCY_FILE).stat().st_size for client in "ab"]
    assert record.attached_bytes == sum(lying) > len(b"table of atable of b")
    assert mailbox.read_root("joined") == b"table of a+table of b"


def forged(mailbox):
    """What a stranger, or b, can put in place of the attachment of a."""
    bobs = keys.signer(BOB, spec_of(mailbox).id)
    alices = keys.signer(ALICE, spec_of(mailbox).id)
    genuine = mailbox.read_attachment("a", SALIENCY_FILE, max_bytes=10**6)
    signature = message.unpack_signed(genuine).signature
    return {
        "bare": b"forged",
        "unsigned": attachment(mailbox, "a", b"forged"),
        "signed by another client": attachment(mailbox, "a", b"forged", sign=bobs),
        "with the signature of the genuine one": attachment(mailbox, "a", b"forged", sign=lambda digest: signature),
        "of another client": mailbox.read_attachment("b", SALIENCY_FILE, max_bytes=10**6),
        "of another federation": attachment(mailbox, "a", b"forged", sign=keys.signer(ALICE, "0" * 64)),
        "of another round": attachment(mailbox, "a", b"forged", sign=alices, round=7),
        "of another adapter": attachment(mailbox, "a", b"forged", sign=alices, base="0" * 64),
        "of another shape": attachment(mailbox, "a", b"forged", sign=alices, schema="0" * 64),
        "of another name": attachment(mailbox, "a", b"forged", sign=alices, params={"name": "probe.safetensors"}),
        "with examples": attachment(mailbox, "a", b"forged", sign=alices, num_examples=3),
        "with more parameters": attachment(
            mailbox, "a", b"forged", sign=alices, params={"name": SALIENCY_FILE, "more": 1}
        ),
        "the update itself": make_message(mailbox, "a", delta(1), sign=alices),
        "sealed": keys.seal(BOSS.seal_key, attachment(mailbox, "a", b"forged", sign=alices)),
        "too large a file": attachment(mailbox, "a", bytes(attachments.MAX_BYTES + 1), sign=alices),
        "too large by far": bytes(3 * attachments.MAX_BYTES),
        "cut off": genuine[:-1],
        "empty": b"",
    }


@pytest.mark.parametrize(
    "kind",
    [
        "bare",
        "unsigned",
        "signed by another client",
        "with the signature of the genuine one",
        "of another client",
        "of another federation",
        "of another round",
        "of another adapter",
        "of another shape",
        "of another name",
        "with examples",
        "with more parameters",
        "the update itself",
        "sealed",
        "too large a file",
        "too large by far",
        "cut off",
        "empty",
    ],
)
def test_a_forged_attachment_is_left_out_and_the_round_closes(tmp_path, kind, caplog):
    mailbox = signed_federation(tmp_path)
    mailbox.post_attachment("a", SALIENCY_FILE, forged(mailbox)[kind])
    joining = Joining(mailbox)
    assert joining.close_round().finished
    assert joining.seen == [b"table of b"]
    assert "The attachment of client a is left out: " in caplog.text


def test_an_attachment_of_an_earlier_round_is_left_out(tmp_path):
    mailbox = found_enrolled(tmp_path, SIGNED, **{**SHARED, "rounds": 2}, signatures=True)
    old = attachment(mailbox, "a", b"old", sign=keys.signer(ALICE, spec_of(mailbox).id))
    for pair, client in ((ALICE, "a"), (BOB, "b")):
        take_part(mailbox, client, b"table of " + client.encode(), pair)
    assert not (tmp_path / "attachments").exists()  # only the last round asks for them
    Joining(mailbox).close_round()
    for pair, client in ((ALICE, "a"), (BOB, "b")):
        take_part(mailbox, client, b"table of " + client.encode(), pair)
    mailbox.post_attachment("a", SALIENCY_FILE, old)
    joining = Joining(mailbox)
    assert joining.close_round().finished
    assert joining.seen == [b"table of b"]


def test_an_attachment_is_no_update(tmp_path):
    mailbox = found_enrolled(tmp_path, SIGNED, **SHARED, signatures=True)
    mailbox.post_update(0, "a", attachment(mailbox, "a", b"x", sign=keys.signer(ALICE, spec_of(mailbox).id)))
    (refused,) = Joining(mailbox).coordinator._round.collect().refused
    assert refused.reason == "It names codec attachment; expected fp32."


def test_where_no_signatures_are_asked_for_it_is_still_bound_to_its_client(tmp_path):
    mailbox = found(tmp_path, **SHARED)
    for client in "ab":
        take_part(mailbox, client, b"table of " + client.encode())
    mailbox.post_attachment("b", SALIENCY_FILE, mailbox.read_attachment("a", SALIENCY_FILE, max_bytes=10**6))
    joining = Joining(mailbox)
    joining.close_round()
    assert joining.seen == [b"table of a"]


def test_the_largest_file_fits_with_signature_and_seal(tmp_path):
    mailbox = found_enrolled(
        tmp_path, SIGNED, **SHARED, signatures=True, sealing_key=BOSS.seal_key, max_message_bytes=4096
    )
    largest = bytes(attachments.MAX_BYTES)
    take_part(mailbox, "a", largest, ALICE)
    take_part(mailbox, "b", largest + b"x", BOB)
    joining = Joining(mailbox, BOSS)
    joining.close_round()
    assert joining.seen == [largest]

"""Screening: whatever is not just what the round asks for is refused, in words; one test per reason."""

import re
import struct
from dataclasses import replace

import pytest
import torch
from light import SCHEMA, make_spec
from light_updates import delta, found_enrolled, make_message

from fedfstq_hf.codec import SparseUpdate, get_codec, message
from fedfstq_hf.codec.message import PAIR_PARAMS, join_pair
from fedfstq_hf.errors import MessageError
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.control import Control, Enrolment
from fedfstq_hf.federation.mailbox.protocol import UpdateRef
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.screening import Screening
from fedfstq_hf.federation.spec import FederationSpec

ALICE, BOB, BOSS, OTHER_BOSS = (keys.new_keypair() for _ in range(4))


class Box:
    """A federation of a (and b), its screening, and messages of a."""

    def __init__(self, path, *, enrolments=None, unseal=None, **changes):
        self.mailbox = found_enrolled(path, enrolments or "ab", **changes)
        self.spec = FederationSpec.from_json(self.mailbox.read(0, "spec.json"))
        self.base = RoundRecord.from_json(self.mailbox.read(0, "round.json")).adapter_digest
        control = Control.from_json(self.mailbox.read_control())
        self.screening = Screening(self.spec, SCHEMA, control, unseal)

    def message(self, client_id="a", update=None, **changes):
        return make_message(self.mailbox, client_id, delta(1) if update is None else update, **changes)

    def open(self, data, client_id="a", round=0, base=None):
        return self.screening.open(UpdateRef(client_id, round, len(data)), data, base or self.base)

    def refuses(self, data, match, **where):
        with pytest.raises(MessageError, match=match):
            self.open(data, **where)


def test_what_is_asked_for_passes(tmp_path):
    box = Box(tmp_path)
    opened = box.open(box.message(num_examples=7))
    assert torch.equal(opened.update.to_dense(), delta(1))
    assert (opened.header.num_examples, opened.header.client_id, opened.signed) == (7, "a", False)


# Before it is read


def test_a_client_that_is_not_enrolled(tmp_path):
    screening = Box(tmp_path).screening
    screening.check_sender(UpdateRef("a", 0, 10), None)
    with pytest.raises(MessageError, match=r"^Client z is not enrolled in this federation\.$"):
        screening.check_sender(UpdateRef("z", 0, 10), None)


def test_a_client_that_was_not_selected(tmp_path):
    screening = Box(tmp_path).screening
    screening.check_sender(UpdateRef("a", 0, 10), ("a",))
    with pytest.raises(MessageError, match=r"^Client b was not selected for this round\.$"):
        screening.check_sender(UpdateRef("b", 0, 10), ("a",))


def test_a_message_that_is_too_large(tmp_path):
    screening = Box(tmp_path, max_message_bytes=1000).screening
    screening.check_sender(UpdateRef("a", 0, 1000), None)
    with pytest.raises(MessageError, match=r"^It has 1001 bytes; this federation takes at most 1000\.$"):
        screening.check_sender(UpdateRef("a", 0, 1001), None)


def test_sealing_adds_its_bytes_to_the_limit():
    spec = make_spec(max_message_bytes=1000, sealing_key=BOSS.seal_key)
    assert Screening(spec, SCHEMA, Control()).max_bytes == 1000 + keys.SEAL_OVERHEAD


# What it says of itself


def test_a_copied_message_of_another_client(tmp_path):
    box = Box(tmp_path)
    box.refuses(box.message("b"), "^It names client b; expected a.$")


def test_a_replay_from_another_round(tmp_path):
    box = Box(tmp_path)
    box.refuses(box.message(), "^It names round 0; expected 1.$", round=1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": "0" * 64}, "It names base adapter 0{64}; expected [0-9a-f]{64}"),
        ({"schema": "0" * 64}, "It names schema 0{64}; expected [0-9a-f]{64}"),
        ({"codec": "fp16"}, "It names codec fp16; expected fp32"),
        ({"num_examples": 0}, "It says that it was trained on 0 examples; expected at least 1"),
    ],
)
def test_a_header_that_names_something_else(tmp_path, changes, reason):
    box = Box(tmp_path)
    box.refuses(box.message(**changes), reason)


def test_a_payload_for_an_adapter_of_another_shape(tmp_path):
    """The header claims the federation's schema, but the numbers are of a smaller adapter."""
    box = Box(tmp_path)
    header, payload = message.unpack(box.message())
    box.refuses(message.pack(header, payload[:-4]), "bytes|payload")


def test_a_larger_message_than_its_listing_said(tmp_path):
    box = Box(tmp_path, max_message_bytes=500)
    box.refuses(box.message(), "at most 500 were allowed")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(tmp_path, value):
    box = Box(tmp_path)
    header, payload = message.unpack(box.message())
    spoiled = payload[:-4] + struct.pack("<f", value)
    box.refuses(message.pack(header, spoiled), "finite|NaN|not a number")


def test_numbers_that_are_not_finite_and_pass_the_decoder(tmp_path, monkeypatch):
    """Screening does not rely on what each codec checks."""
    box = Box(tmp_path)
    poison = torch.zeros(SCHEMA.num_params)
    poison[3] = torch.nan
    codec = type(get_codec("fp32"))
    monkeypatch.setattr(codec, "decode", lambda *args, **kwargs: SparseUpdate(SCHEMA.num_params, None, poison))
    box.refuses(box.message(), r"^It decodes to values that are not finite\.$")


def test_a_control_variate_that_is_not_finite(tmp_path, monkeypatch):
    box = Box(tmp_path, scaffold=True, num_clients=2)
    _, payload = message.unpack(box.message())
    good, poison = torch.ones(SCHEMA.num_params), torch.full((SCHEMA.num_params,), torch.inf)
    decoded = iter([good, good, poison, good])  # the variate is the first that is decoded of a message
    codec = type(get_codec("fp32"))
    monkeypatch.setattr(codec, "decode", lambda *args, **kwargs: SparseUpdate(SCHEMA.num_params, None, next(decoded)))
    pair = message.pack(_header(box, params=dict(PAIR_PARAMS)), join_pair(payload, payload))
    assert torch.equal(box.open(pair).variate.to_dense(), good)
    box.refuses(pair, r"^It decodes to values that are not finite\.$")


def test_one_payload_where_two_are_expected(tmp_path):
    box = Box(tmp_path, scaffold=True, num_clients=2)
    box.refuses(box.message(), r"carries no control variate; this federation's messages have two payloads\.$")


def _header(box, **changes):
    return message.Header(0, "a", 1, box.base, SCHEMA.fingerprint, "fp32", **changes)


# Signatures

SIGNED = {"a": Enrolment(verify_key=ALICE.verify_key), "b": Enrolment(verify_key=BOB.verify_key)}


def test_a_signature_is_verified(tmp_path):
    box = Box(tmp_path, enrolments=SIGNED, signatures=True)
    opened = box.open(box.message(sign=keys.signer(ALICE, box.spec.id)))
    assert opened.signed


def test_a_message_without_the_enrolled_signature(tmp_path):
    box = Box(tmp_path, enrolments=SIGNED)
    box.refuses(box.message(), "^It is not signed; client a is enrolled with a verify key.$")


def test_a_signature_of_somebody_else(tmp_path):
    box = Box(tmp_path, enrolments=SIGNED)
    box.refuses(box.message(sign=keys.signer(BOB, box.spec.id)), "message signature is not by ed25519:")


def test_a_signature_for_another_federation(tmp_path):
    box = Box(tmp_path, enrolments=SIGNED)
    box.refuses(box.message(sign=keys.signer(ALICE, make_spec().id)), "signature is not by .* for federation")


def test_a_signed_message_that_was_changed_and_digested_anew(tmp_path):
    box = Box(tmp_path, enrolments=SIGNED)
    genuine = message.unpack_signed(box.message(sign=keys.signer(ALICE, box.spec.id)))
    forged = message.pack(genuine.header, genuine.payload[::-1], sign=lambda digest: genuine.signature)
    box.refuses(forged, "signature is not by")


def test_where_signatures_are_demanded_a_client_without_a_key_is_refused(tmp_path):
    box = Box(tmp_path, enrolments={**SIGNED, "c": Enrolment()}, signatures=True)
    for sign in (None, keys.signer(ALICE, box.spec.id)):
        box.refuses(box.message("c", sign=sign), "^No verify key is enrolled for client c", client_id="c")


def test_without_an_enrolled_key_a_signature_proves_nothing(tmp_path):
    box = Box(tmp_path)
    assert not box.open(box.message(sign=keys.signer(BOB, box.spec.id))).signed


# Sealing


def unsealer(pair):
    return lambda data: keys.unseal(pair, data)


def test_a_sealed_message_is_opened(tmp_path):
    box = Box(tmp_path, sealing_key=BOSS.seal_key, unseal=unsealer(BOSS))
    opened = box.open(keys.seal(BOSS.seal_key, box.message()))
    assert torch.equal(opened.update.to_dense(), delta(1))


def test_a_readable_message_where_sealed_ones_are_asked_for(tmp_path):
    box = Box(tmp_path, sealing_key=BOSS.seal_key, unseal=unsealer(BOSS))
    box.refuses(box.message(), "^It is not sealed; this federation takes sealed messages only.$")


def test_a_sealed_message_where_readable_ones_are_asked_for(tmp_path):
    box = Box(tmp_path, unseal=unsealer(BOSS))
    box.refuses(keys.seal(BOSS.seal_key, box.message()), "^It is sealed, but this federation has no sealing key.$")


def test_a_coordinator_without_the_key(tmp_path):
    box = Box(tmp_path, sealing_key=BOSS.seal_key)
    box.refuses(keys.seal(BOSS.seal_key, box.message()), r"this coordinator was started without the key: give --key")


def test_a_message_sealed_to_another_key(tmp_path):
    box = Box(tmp_path, sealing_key=BOSS.seal_key, unseal=unsealer(BOSS))
    box.refuses(keys.seal(OTHER_BOSS.seal_key, box.message()), "cannot be unsealed: it was altered, or sealed to")


def test_a_sealed_message_that_was_altered(tmp_path):
    box = Box(tmp_path, sealing_key=BOSS.seal_key, unseal=unsealer(BOSS))
    sealed = keys.seal(BOSS.seal_key, box.message())
    box.refuses(sealed[:-1] + bytes([sealed[-1] ^ 1]), "cannot be unsealed")


def test_sealed_and_signed(tmp_path):
    """The signature lies inside the seal: whoever seals anew cannot pretend to be the client."""
    box = Box(tmp_path, enrolments=SIGNED, sealing_key=BOSS.seal_key, unseal=unsealer(BOSS))
    signed = box.message(sign=keys.signer(ALICE, box.spec.id))
    assert box.open(keys.seal(BOSS.seal_key, signed)).signed
    box.refuses(keys.seal(BOSS.seal_key, signed), "It names client a; expected b", client_id="b")
    box.refuses(keys.seal(BOSS.seal_key, box.message()), "It is not signed")


def test_no_reason_quotes_more_than_a_line_of_what_was_sent(tmp_path):
    """Reasons end up in public records."""
    box = Box(tmp_path)
    for data in (b"", b"\xff" * 300, b"x" * 3000, box.message()[:-1], box.message("b")):
        with pytest.raises(MessageError) as refused:
            box.open(data)
        assert len(str(refused.value)) < 300
        assert not re.search(r"[\x00-\x1f]", str(refused.value))


# What nobody signed, or what no message of this federation says


def test_a_message_of_another_size_than_it_was_listed_with(tmp_path):
    box = Box(tmp_path, enrolments=SIGNED)
    data = box.message(sign=keys.signer(ALICE, box.spec.id))
    with pytest.raises(MessageError, match=rf"^It has {len(data)} bytes; the mailbox listed it with 4000\.$"):
        box.screening.open(UpdateRef("a", 0, 4000), data, box.base)


@pytest.mark.parametrize("params", [{"payloads": 2}, {"x": 1}, {"refinement": False}, {"refinement": True, "x": None}])
def test_parameters_that_no_message_of_this_federation_has(tmp_path, params):
    box = Box(tmp_path)
    box.refuses(box.message(params=params), "It has parameters {'.*; this federation's messages have none of these")


@pytest.mark.parametrize("refinement", [True, False])
def test_a_first_message_and_a_refinement_do_not_stand_for_each_other(tmp_path, refinement):
    box = Box(tmp_path, enrolments=SIGNED)
    params = message.REFINEMENT_PARAMS if refinement else {}
    data = box.message(sign=keys.signer(ALICE, box.spec.id), params=params)
    assert box.screening.open(UpdateRef("a", 0, len(data), refinement=refinement), data, box.base).signed
    with pytest.raises(MessageError, match="and lies where the round's"):
        box.screening.open(UpdateRef("a", 0, len(data), refinement=not refinement), data, box.base)


def test_one_that_says_of_how_many_examples_only_within_bounds(tmp_path):
    box = Box(tmp_path)
    assert box.open(box.message(num_examples=2**53 - 1)).header.num_examples == 2**53 - 1
    with pytest.raises(MessageError, match=r"num_examples is 9007199254740992; expected an integer from 0 to 2\*\*53"):
        box.message(num_examples=2**53)


# Norms


@pytest.mark.parametrize("value", [3e38, 1e20, 1e-30])
def test_norms_neither_overflow_nor_vanish(tmp_path, value):
    """Their squares are beyond float32, not beyond float64."""
    box = Box(tmp_path)
    opened = box.open(box.message(update=torch.full((SCHEMA.num_params,), value)))
    assert opened.norm == pytest.approx(value * SCHEMA.num_params**0.5, rel=1e-6)


@pytest.mark.parametrize("variate", [False, True])
def test_a_squared_norm_beyond_float64(tmp_path, monkeypatch, variate):
    box = Box(tmp_path, **({"scaffold": True, "num_clients": 2} if variate else {}))
    poison = torch.full((SCHEMA.num_params,), 1e200, dtype=torch.float64)
    decoded = [SparseUpdate(SCHEMA.num_params, None, poison), SparseUpdate(SCHEMA.num_params, None, delta(1))]
    data = box.message()
    if variate:
        header, payload = message.unpack(data)
        data = message.pack(replace(header, params=PAIR_PARAMS), join_pair(payload, payload))
    monkeypatch.setattr(type(get_codec("fp32")), "decode", lambda *args, **kwargs: decoded.pop(0))
    box.refuses(data, r"^It decodes to values that are not finite\.$")
    assert len(decoded) == (0 if variate else 1)

"""What a session makes of one update: every byte of it counts towards the budget, and the record knows what travels."""

import hashlib

import pytest
import torch
from light import make_spec
from light_sessions import record

from fedfstq_hf.codec import Schema, message
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.client.outbox import Pending
from fedfstq_hf.federation.client.session import Caps, ClientSession, says_nothing_yet

SCHEMA = Schema.from_state_dict({f"layer.{number}": torch.zeros(16, 512) for number in range(4)})
DELTA = torch.randn(SCHEMA.num_params, generator=torch.Generator().manual_seed(0))
READER = keys.new_keypair()
SEALED = {"sealing_key": READER.seal_key}
PAIR = {"scaffold": True, "num_clients": 2}


def make_session(*, sign=None, caps=None, **spec):
    settings = {"codec": "fstq", "schema": SCHEMA.fingerprint, "rounds": 3, **spec}
    return ClientSession("anna", make_spec(**settings), SCHEMA, sign=sign, caps=caps)


def finish(session, round=0, **changes):
    settings = {"fisher": None, "num_examples": 9, "max_bytes": 900, **changes}
    variate = torch.flip(DELTA, [0]) if session.spec.method.scaffold else None
    return session.finish(round, "0" * 64, DELTA, variate=variate, **settings)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("spec", [{}, SEALED, PAIR, SEALED | PAIR], ids=["plain", "sealed", "pair", "sealed pair"])
def test_a_message_fills_its_budget_and_no_more(signed, spec):
    session = make_session(sign=(lambda digest: digest + digest) if signed else None, **spec)
    assert 900 - 32 <= len(finish(session).message) <= 900


def test_a_cap_holds_whatever_the_examples_say_and_enlarges_nothing():
    wide = make_session(mean_examples=9)
    assert len(finish(wide, num_examples=36).message) > 1200
    capped = make_session(mean_examples=9, caps=Caps(first=1000))
    assert 1000 - 32 <= len(finish(capped, num_examples=36).message) <= 1000
    assert len(finish(make_session(caps=Caps(first=1000))).message) <= 900


def test_previews_and_what_follows_them_have_their_own_budgets():
    refined = {"refinement_budget": "1bpp", "preview_step": 0.5, "error_feedback": 0.0}
    session = make_session(caps=Caps(first=500, refinement=700), **refined)
    preview = finish(session, 0, refinement_bytes=900)
    assert 500 - 32 <= len(preview.message) <= 500
    assert 700 - 32 <= len(preview.refinement) <= 700
    session.settle(record(1))
    last = finish(session, 2, refinement_bytes=900)  # no refinement follows it
    assert last.refinement is None
    assert 700 - 32 <= len(last.message) <= 700


def test_the_record_names_what_travels():
    pending = finish(make_session(**SEALED))
    assert message.is_sealed(pending.message)
    assert keys.unseal(READER, pending.message) == pending.readable
    assert pending.sha256 == hashlib.sha256(pending.message).hexdigest()


def test_only_an_empty_message_that_a_refinement_follows_says_nothing_yet():
    header = message.Header(0, "anna", 1, "0" * 64, "0" * 64, "fp32")
    empty, full = message.pack(header, b""), message.pack(header, b"payload")

    def says_nothing(readable, refinement):
        return says_nothing_yet(Pending(0, readable, torch.zeros(1), readable, refinement))

    assert says_nothing(empty, full)
    assert not says_nothing(empty, None)
    assert not says_nothing(full, full)
    assert not says_nothing(full, None)

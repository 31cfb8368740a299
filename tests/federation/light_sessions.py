"""One client's session, what it finishes, and records that settle that."""

import torch
from light import SCHEMA, make_spec

from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.record import AcceptedUpdate, RefusedUpdate, RoundRecord

BASE = "ab" * 32
DELTA = torch.linspace(-1, 2, SCHEMA.num_params)
FISHER = torch.linspace(0, 1, SCHEMA.num_params)


def make_session(folder=None, *, client_id="a", spec=None, schema=SCHEMA):
    return ClientSession(client_id, spec or SPEC, schema, folder=folder, durable=False)


SPEC = make_spec(codec="topk", rounds=9)


def finish(session, round=0, *, delta=DELTA, fisher=FISHER, max_bytes=300, carried=None):
    return session.finish(round, BASE, delta, fisher=fisher, num_examples=5, max_bytes=max_bytes, carried=carried or {})


def record(round, *, accepted=(), refused=()):
    return RoundRecord(
        round=round,
        adapter_sha256=BASE,
        adapter_digest=BASE,
        adapter_bytes=1,
        schema=SCHEMA.fingerprint,
        opened_at=0.0,
        deadline=None,
        finished=False,
        accepted=tuple(AcceptedUpdate("a", pending.sha256, len(pending.message), 5, 1.0, 1.0) for pending in accepted),
        refused=tuple(RefusedUpdate("a", pending.sha256, len(pending.message), "why not") for pending in refused),
    )

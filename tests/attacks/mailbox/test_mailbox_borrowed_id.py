"""A mailbox that borrows the id of another federation: what is signed for it must be good nowhere else."""

import dataclasses
import json

import pytest
from light import SCHEMA, fake_training, make_spec, pause
from light_updates import found_enrolled

from fedfstq_hf.codec.budget import MessageBudget
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.client.participation import MailboxParticipation
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.control import Enrolment
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.spec import FederationSpec

ALICE = keys.KeyPair(b"\1" * 32)
SETTINGS = {"rounds": 1, "min_clients": 1, "signatures": True}


def other_value(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 0.25
    return {"else": 1} if isinstance(value, dict) else f"{value or ''}x"


def test_no_field_of_a_spec_can_be_changed_without_its_id():
    fields = json.loads(make_spec().to_json())
    assert set(fields) == {"id", "format", *(field.name for field in dataclasses.fields(FederationSpec))}
    for name in set(fields) - {"id"}:
        altered = json.dumps({**fields, name: other_value(fields[name])}).encode()
        with pytest.raises(MailboxError):
            FederationSpec.from_json(altered)


@pytest.mark.parametrize(
    "change", [{"rounds": 9}, {"training": {"learning_rate": 1.0}}, {"local_steps": 999}, {"signatures": True}]
)
def test_an_altered_spec_is_said_to_be_one(change):
    fields = json.loads(make_spec().to_json())
    with pytest.raises(
        MailboxError, match=f"says that its id is '{fields['id']}', but its content has id [0-9a-f]{{64}}: it was"
    ):
        FederationSpec.from_json(json.dumps({**fields, **change}).encode())


@pytest.mark.parametrize("stored", [None, 7, "", [], "0" * 64, "x" * 5000])
def test_an_id_that_is_none_of_this_content(stored):
    fields = {**json.loads(make_spec().to_json()), "id": stored}
    with pytest.raises(MailboxError, match="its content has id") as refused:
        FederationSpec.from_json(json.dumps(fields).encode())
    assert len(str(refused.value)) < 400


def test_a_message_signed_for_a_federation_with_other_settings_is_refused(tmp_path):
    enrolled = {"a": Enrolment(verify_key=ALICE.verify_key)}
    wanted = found_enrolled(tmp_path / "wanted", enrolled, **SETTINGS)
    genuine = FederationSpec.from_json(wanted.read(0, "spec.json"))
    # all that is public is borrowed: members, round 0, salt; only the training is another
    hostile = found_enrolled(
        tmp_path / "hostile", enrolled, **SETTINGS, salt=genuine.salt, local_steps=999, training={"learning_rate": 1.0}
    )
    spec = FederationSpec.from_json(hostile.read(0, "spec.json"))
    session = ClientSession("a", spec, SCHEMA, folder=None, sign=keys.signer(ALICE, spec.id))
    participation = MailboxParticipation(hostile, session, budget=MessageBudget(), sleep=pause)
    assignment = participation.next()
    participation.complete(assignment, fake_training(assignment.adapter, assignment.seed, {}))
    (ref,) = hostile.list_updates(0)
    stolen = hostile.read_update(ref, max_bytes=10**6)
    assert Coordinator(hostile).close_round().accepted[0].signed

    wanted.post_update(0, "a", stolen)
    coordinator = Coordinator(wanted)
    assert coordinator.close_round() is None
    (refused,) = coordinator._round.collect().refused
    assert "is not by ed25519:" in refused.reason
    assert genuine.id[:12] in refused.reason

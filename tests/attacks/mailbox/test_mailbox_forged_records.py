"""Who can write a mailbox and holds no key of the founder: no client trains from, or believes, a record of his."""

import dataclasses
import hashlib
import json
from functools import partial

import pytest
import torch
from light import LightClient, initial_state, make_spec

from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import adapter_file, key_files, keys
from fedfstq_hf.federation.envelope import sign_record
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.key_files import coordinator_signer
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.reporting.status import render_status

FOUNDER, MALLORY = keys.KeyPair(b"\1" * 32), keys.KeyPair(b"\2" * 32)


def founded(path, **changes):
    mailbox = FolderMailbox(path, durable=False)
    spec = make_spec(min_clients=1, rounds=4, founder_key=FOUNDER.verify_key, **changes)
    adapter = adapter_file.dump(initial_state())
    found_federation(mailbox, spec, adapter, b"{}\n", now=0.0, sign=keys.signer(FOUNDER, spec.id))
    return mailbox


def spec_of(mailbox):
    return FederationSpec.from_json(mailbox.read(0, "spec.json"))


def signed_by(pair, mailbox):
    return keys.signer(pair, spec_of(mailbox).id)


def rewrite(mailbox, round, record):
    (mailbox.path / "rounds" / f"{round:06d}" / "round.json").write_bytes(record.to_json())


def record_of(mailbox, round):
    return RoundRecord.from_json(mailbox.read(round, "round.json"))


def test_a_federation_goes_on_with_the_founder_s_signature(tmp_path):
    mailbox = founded(tmp_path, sealing_key=None)
    client = LightClient(mailbox, "a", None)
    for round in range(1, 5):
        assert client.step()
        assert Coordinator(mailbox, sign=signed_by(FOUNDER, mailbox)).close_round().round == round
    client.step()
    assert client.done
    assert [settlement.outcome for settlement in client.participation.settlements] == ["accepted"] * 4
    assert "round 4/4" in render_status(mailbox)


def poisoned(mailbox):
    """Round 0 with another adapter, whose digest the record names."""
    data = adapter_file.dump({name: torch.full_like(tensor, 9.0) for name, tensor in initial_state().items()})
    (mailbox.path / "rounds" / "000000" / "adapter_model.safetensors").write_bytes(data)
    return dataclasses.replace(record_of(mailbox, 0), adapter_sha256=hashlib.sha256(data).hexdigest())


FORGERIES = {
    "another adapter": poisoned,
    "the adapter of a stranger who signs": lambda m: resigned(poisoned(m), m, MALLORY),
    "another selection": lambda m: dataclasses.replace(record_of(m, 0), selected=("nobody",)),
    "an end": lambda m: dataclasses.replace(record_of(m, 0), finished=True),
    "no signature": lambda m: dataclasses.replace(record_of(m, 0), signature=""),
    "no hex": lambda m: dataclasses.replace(record_of(m, 0), signature="zz"),
    "a number": lambda m: dataclasses.replace(record_of(m, 0), signature=7),
    "half a signature": lambda m: dataclasses.replace(record_of(m, 0), signature=record_of(m, 0).signature[:64]),
}


def resigned(record, mailbox, pair):
    spec = dataclasses.replace(spec_of(mailbox), founder_key=pair.verify_key)
    return sign_record(record, spec, signed_by(pair, mailbox))


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_client_takes_no_forged_record(tmp_path, kind):
    mailbox = founded(tmp_path)
    rewrite(mailbox, 0, FORGERIES[kind](mailbox))
    client = LightClient(mailbox, "a", None)
    with pytest.raises(MailboxError, match=f"record of round 0 is not signed with {FOUNDER.verify_key}|cannot be read"):
        client.step()
    assert client.session.last_round == -1
    assert mailbox.list_updates(0) == []
    with pytest.raises(MailboxError, match=r"is not signed with|cannot be read"):
        Coordinator(mailbox, sign=signed_by(FOUNDER, mailbox))


def test_an_update_is_not_settled_by_a_forged_record(tmp_path):
    mailbox = founded(tmp_path, codec="topk")
    client = LightClient(mailbox, "a", None, max_bytes=600)
    client.step()
    Coordinator(mailbox, sign=signed_by(FOUNDER, mailbox)).close_round()
    genuine = record_of(mailbox, 1)
    rewrite(mailbox, 1, dataclasses.replace(genuine, accepted=()))  # the client would send all of it again
    with pytest.raises(MailboxError, match="record of round 1 is not signed"):
        client.step()
    assert client.session.pending is not None
    rewrite(mailbox, 1, genuine)
    client.participation._record._kept.clear()
    client.step()
    assert client.participation.settlements[0].outcome == "accepted"


def test_a_signed_record_of_another_round_or_federation_is_none_of_this_one(tmp_path):
    mailbox, other = founded(tmp_path / "one"), founded(tmp_path / "other")
    rewrite(mailbox, 0, record_of(other, 0))
    with pytest.raises(MailboxError, match="record of round 0 is not signed"):
        LightClient(mailbox, "a", None).step()

    client = LightClient(other, "a", None)
    client.step()
    Coordinator(other, sign=signed_by(FOUNDER, other)).close_round()
    rewrite(other, 1, record_of(other, 0))
    with pytest.raises(MailboxError, match="holds the record of round 0 where that of round 1 belongs"):
        client.step()


def test_the_key_belongs_to_the_settings_that_the_id_commits_to(tmp_path):
    fields = json.loads(founded(tmp_path).read(0, "spec.json"))
    for key in (None, MALLORY.verify_key):
        with pytest.raises(MailboxError, match="its content has id"):
            FederationSpec.from_json(json.dumps({**fields, "founder_key": key}).encode())


def test_without_the_key_nothing_is_published(tmp_path):
    with pytest.raises(ConfigError, match=r"are signed with ed25519:.*--key KEYFILE"):
        found_federation(
            FolderMailbox(tmp_path / "new"),
            make_spec(founder_key=FOUNDER.verify_key),
            adapter_file.dump(initial_state()),
            b"{}\n",
        )
    assert FolderMailbox(tmp_path / "new").head() is None
    mailbox = founded(tmp_path / "box")
    LightClient(mailbox, "a", None).step()
    with pytest.raises(ConfigError, match=r"are signed with ed25519:.*--key KEYFILE"):
        Coordinator(mailbox).close_round()
    assert mailbox.head() == 0


def test_key_files_are_checked_before_anything_is_done(tmp_path):
    spec = spec_of(founded(tmp_path / "box"))
    for name, pair in (("founder", FOUNDER), ("mallory", MALLORY)):
        key_files.save_keypair(tmp_path / name, pair)
    digest = bytes(32)
    assert coordinator_signer("box", spec, tmp_path / "founder")(digest) == keys.signer(FOUNDER, spec.id)(digest)
    with pytest.raises(ConfigError, match=r"Records of box are signed with .*Type --key KEYFILE"):
        coordinator_signer("box", spec, None)
    with pytest.raises(ConfigError, match=f"mallory signs as {MALLORY.verify_key}"):
        coordinator_signer("box", spec, tmp_path / "mallory")
    assert coordinator_signer("box", make_spec(), None) is None


def test_sealed_figures_and_signature_go_together(tmp_path):
    mailbox = founded(tmp_path, sealing_key=FOUNDER.seal_key)
    client = LightClient(mailbox, "a", None)
    for _ in range(2):
        client.step()
        unseal = partial(keys.unseal, FOUNDER)
        assert Coordinator(mailbox, unseal=unseal, sign=signed_by(FOUNDER, mailbox)).close_round() is not None
    assert record_of(mailbox, 2).hides_figures
    rewrite(mailbox, 2, dataclasses.replace(record_of(mailbox, 2), sealed=record_of(mailbox, 1).sealed))
    with pytest.raises(MailboxError, match="record of round 2 is not signed"):
        client.step()

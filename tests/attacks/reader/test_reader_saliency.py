"""Token sensitivities that are published: what they tell a reader about a single client."""

import torch
from light import LightClient, found, run_rounds

from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.generation.saliency import Saliency, pack, unpack
from fedfstq_hf.generation.shared_saliency import join_saliency
from fedfstq_hf.reporting.status import render_status

SIZE = 8


def table(ids):
    levels = torch.zeros(SIZE, dtype=torch.uint8)
    levels[list(ids)] = 1
    return pack(Saliency(torch.arange(SIZE, dtype=torch.float32), levels, "t"))


def federate(path, tables):
    """One round in which all of a, b, c, d take part, and some share what they saw; returns the mailbox."""
    mailbox = found(path, rounds=1, min_clients=4, share_saliency=True)
    clients = [LightClient(mailbox, name, None) for name in "abcd"]
    for client in clients:
        if (ids := tables.get(client.session.client_id)) is not None:
            client.participation.uplink.saliency = lambda carried, ids=ids: table(ids)
    run_rounds(Coordinator(mailbox, saliency=join_saliency), clients)
    return mailbox


def test_of_one_sharer_or_two_nothing_is_published_and_that_is_recorded(tmp_path, caplog):
    for sharers in ("a", "ab"):
        mailbox = federate(tmp_path / sharers, dict.fromkeys(sharers, (1, 2, 3)))
        assert mailbox.read_root("saliency.safetensors") is None
        assert mailbox.read_root("custom_generate/generate.py") is None
        record = RoundRecord.from_json(mailbox.read(1, "round.json"))
        assert f"Token sensitivities of {len(sharers)} clients are usable" in record.unpublished
        assert record.attached_bytes > 0
        assert f"no token sensitivities published: {record.unpublished}" in render_status(mailbox)
        assert record.unpublished in caplog.text


def test_what_fewer_than_three_of_four_sharers_saw_looks_unseen(tmp_path):
    mailbox = federate(tmp_path, {"a": [0, 1, 2, 5], "b": [1, 2, 5], "c": [2, 5], "d": [5, 6]})
    published = unpack(mailbox.read_root("saliency.safetensors"))
    assert torch.nonzero(published.levels).flatten().tolist() == [2, 5]
    assert torch.isinf(published.scores()).tolist() == [id not in (2, 5) for id in range(SIZE)]
    assert RoundRecord.from_json(mailbox.read(1, "round.json")).unpublished == ""


def test_where_nobody_shares_nothing_is_said(tmp_path):
    mailbox = federate(tmp_path, {})
    assert RoundRecord.from_json(mailbox.read(1, "round.json")).unpublished == ""
    assert mailbox.read_root("saliency.safetensors") is None

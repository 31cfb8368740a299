"""SCAFFOLD without a model: what travels, what each side keeps, and the algorithm's own invariant."""

import json

import pytest
import torch
from light import SCHEMA, LightClient, found, initial_state, make_spec

from fedfstq_hf.codec import message
from fedfstq_hf.codec.message import join_pair, split_pair
from fedfstq_hf.errors import ConfigError, MailboxError, MessageError
from fedfstq_hf.federation import adapter_file, scaffold
from fedfstq_hf.federation.client.participation import LocalResult
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.mailbox.protocol import VARIATE_FILE
from fedfstq_hf.federation.server.coordinator import Coordinator

SIZE = SCHEMA.num_params
SHARED = {"rounds": 9, "min_clients": 1, "scaffold": True, "num_clients": 4, "max_message_bytes": 9000}
RATE, STEPS = 0.1, 3


def local_sgd(adapter, server, client, centre, curvature):
    """Algorithm 1, lines 9 to 12, for f_i(y) = curvature |y - centre|^2 / 2: y_K and option II's c_i+, as printed."""
    y = adapter.double()
    for _ in range(STEPS):
        y = y - RATE * (curvature * (y - centre) - client + server)
    return y.float(), (client - server + (adapter.double() - y) / (STEPS * RATE)).float()


class Client(LightClient):
    """A quadratic function of its own, with a minimum at `centre` in all coordinates."""

    def __init__(self, mailbox, name, centre, *, curvature=1.0, examples=1):
        super().__init__(mailbox, name, None)
        self.centre, self.curvature, self.examples = centre, curvature, examples

    def step(self):
        """Train in the open round; returns c_i+ as the paper has it."""
        assignment = self.participation.next()
        client = scaffold.client_variate(self.session.carried, SIZE)
        server = torch.zeros(SIZE) if assignment.variate is None else assignment.variate
        adapter, variate = local_sgd(assignment.adapter, server, client, self.centre, self.curvature)
        taken = None if assignment.variate is None else variate
        result = LocalResult(adapter, None, self.examples, {"other": torch.ones(1)}, variate=taken)
        self.participation.complete(assignment, result)
        return variate


def variate_of(mailbox, coordinator):
    return scaffold.read_variate(mailbox, coordinator.record, coordinator.spec, SIZE)


def test_one_round_by_hand(tmp_path):
    """Two of four clients; the server's mean is over the clients, its control variate over all four."""
    mailbox = found(tmp_path, **SHARED)
    coordinator = Coordinator(mailbox)
    start = SCHEMA.flatten(initial_state())
    assert torch.equal(variate_of(mailbox, coordinator), torch.zeros(SIZE))
    clients = [Client(mailbox, "a", 1.0, examples=1), Client(mailbox, "b", -3.0, examples=99)]
    variates = [client.step() for client in clients]
    coordinator.close_round()

    # y_3 - centre = 0.9^3 (x - centre), all control variates being zero; c_i+ = (1 - 0.729) / 0.3 (x - centre)
    for variate, centre in zip(variates, (1.0, -3.0), strict=True):
        assert torch.allclose(variate, 0.271 / 0.3 * (start - centre), atol=1e-5)
    assert torch.allclose(coordinator.adapter, -1.0 + 0.729 * (start + 1.0), atol=1e-5)  # all clients alike
    assert [entry.weight for entry in coordinator.record.accepted] == [0.5, 0.5]
    assert torch.allclose(variate_of(mailbox, coordinator), (variates[0] + variates[1]) / 4, atol=1e-6)


def test_the_servers_is_the_mean_of_the_clients(tmp_path):
    """Whoever takes part, and whatever arrives too late: c = 1/N sum c_i over all four clients."""
    mailbox = found(tmp_path, **SHARED)
    coordinator = Coordinator(mailbox)
    clients = [Client(mailbox, name, float(i)) for i, name in enumerate("abcd")]
    for taking in ((0, 1), (1, 2), (3,), (0, 1, 2, 3), (2,)):
        for index in taking:
            clients[index].step()
        if taking == (3,):
            late = clients[0].session
            clients[0].step()
            (tmp_path / "updates" / "000002" / "a.safetensors").unlink()  # it comes when the round is closed
        coordinator.close_round()
    assert late.last_round == 3
    held = []
    for client in clients:
        pending = client.session.pending
        if pending is not None:
            client.session.settle(coordinator._record(pending.round + 1))
        held.append(scaffold.client_variate(client.session.carried, SIZE))
        assert "other" in client.session.carried
    assert [s.outcome for s in clients[0].participation.settlements] == ["accepted", "late"]
    assert torch.allclose(variate_of(mailbox, coordinator), sum(held) / 4, atol=1e-5)
    assert float(held[0].abs().max()) > 0.1


@pytest.mark.parametrize("corrected", [True, False])
def test_drift_is_corrected(tmp_path, corrected):
    """Clients of different curvature: SCAFFOLD ends at the minimum of the mean of their functions, FedAvg beside it."""
    settings = {"rounds": 30, "min_clients": 2, "clip": None, "scaffold": corrected, "num_clients": 2}
    mailbox = found(tmp_path, **(SHARED | settings))
    coordinator = Coordinator(mailbox)
    clients = [Client(mailbox, "a", -1.0, curvature=0.4), Client(mailbox, "b", 1.0, curvature=4.0)]
    while not coordinator.finished:
        for client in clients:
            client.step()
        coordinator.close_round()
    minimum = (0.4 * -1.0 + 4.0 * 1.0) / 4.4
    distance = float((coordinator.adapter - minimum).abs().max())
    assert distance < 1e-3 if corrected else distance > 0.05


def test_bytes_of_both_ways_are_counted(tmp_path):
    mailbox = found(tmp_path, **SHARED)
    coordinator = Coordinator(mailbox)
    client = Client(mailbox, "a", 1.0)
    client.step()
    _, payload = message.unpack(client.session.pending.message)
    assert [len(part) for part in split_pair(payload)] == [4 * SIZE, 4 * SIZE]
    coordinator.close_round()
    record = coordinator.record
    assert record.uplink_bytes > 8 * SIZE
    assert record.variate_bytes == len(mailbox.read(1, VARIATE_FILE)) > 4 * SIZE
    before = client.participation.downlink.num_bytes
    client.step()
    assert client.participation.downlink.num_bytes - before >= record.variate_bytes
    assert (
        json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])["downlink_bytes"] > record.variate_bytes
    )
    described = str(message.inspect(client.session.pending.message, SCHEMA))
    assert f"of {SIZE} coordinates" in described


def test_a_lossy_codec_is_agreed_about(tmp_path):
    """What `topk` leaves out of a change is not lost: client and server hold the same c_i, and the rest comes later."""
    mailbox = found(
        tmp_path, **(SHARED | {"scaffold": True, "num_clients": 1, "codec": "topk", "uplink_budget": 500, "rounds": 25})
    )
    coordinator = Coordinator(mailbox)
    client = LightClient(mailbox, "a", None, max_bytes=500)
    wanted = torch.linspace(-1, 1, SIZE)
    gaps = []
    for _ in range(25):
        assignment = client.participation.next()
        client.participation.complete(assignment, LocalResult(assignment.adapter, None, 1, {}, variate=wanted))
        assert len(client.session.pending.message) <= 500
        coordinator.close_round()
        gaps.append(float((variate_of(mailbox, coordinator) - wanted).norm()))
    assert gaps[-1] < 0.05 * gaps[0]


def test_a_huge_change_is_clipped(tmp_path):
    mailbox = found(tmp_path, **(SHARED | {"scaffold": True, "num_clients": 3, "clip": 2.0}))
    coordinator = Coordinator(mailbox)
    for name, size in (("a", 1.0), ("b", 1.0), ("c", 1e6)):
        client = LightClient(mailbox, name, None)
        assignment = client.participation.next()
        change = torch.full((SIZE,), size)
        client.participation.complete(assignment, LocalResult(assignment.adapter, None, 1, {}, variate=change))
    coordinator.close_round()
    assert torch.allclose(variate_of(mailbox, coordinator), torch.full((SIZE,), (1 + 1 + 2) / 3))


def test_a_stop_keeps_the_servers_variate(tmp_path):
    mailbox = found(tmp_path, **SHARED)
    coordinator = Coordinator(mailbox)
    client = Client(mailbox, "a", 1.0)
    for _ in range(2):
        client.step()
        coordinator.close_round()
    kept = variate_of(mailbox, coordinator)
    assert kept.any()
    coordinator.stop()
    assert torch.equal(variate_of(mailbox, coordinator), kept)


def test_after_a_rollback_all_variates_begin_anew(tmp_path):
    """Also that of a client that was away: c = 1/N sum c_i over all four clients goes on to hold."""
    mailbox = found(tmp_path, **SHARED)
    coordinator = Coordinator(mailbox)
    clients = [Client(mailbox, name, float(i)) for i, name in enumerate("abcd")]
    for _ in range(2):
        for client in clients[:3]:
            client.step()
        coordinator.close_round()
    coordinator.rollback(1)
    assert (coordinator.record.variate_sha256, coordinator.record.variate_bytes) == (None, 0)
    assert torch.equal(variate_of(mailbox, coordinator), torch.zeros(SIZE))
    start = coordinator.adapter.clone()
    variates = [client.step() for client in clients[:2]]  # the third sees only what comes after
    for client, variate in zip(clients, variates, strict=False):
        assert torch.allclose(variate, 0.271 / 0.3 * (start - client.centre), atol=1e-5)  # as in a first round
    coordinator.close_round()
    assert torch.allclose(variate_of(mailbox, coordinator), (variates[0] + variates[1]) / 4, atol=1e-6)
    assert clients[2].session.pending is not None
    assignment = clients[2].participation.next()
    assert clients[2].participation.settlements[-1].outcome == "accepted"
    assert scaffold.CARRIED not in clients[2].session.carried
    assert torch.equal(assignment.variate, variate_of(mailbox, coordinator))


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="num_clients must be a whole number of at least 1"):
        make_spec(scaffold=True, num_clients=0)
    mailbox = found(tmp_path / "box", **SHARED)
    coordinator = Coordinator(mailbox)
    client = LightClient(mailbox, "a", None)
    assignment = client.participation.next()
    with pytest.raises(MailboxError, match=r"control variates \(SCAFFOLD\), and the client's is missing"):
        client.participation.complete(assignment, LocalResult(assignment.adapter, None, 1, {}))
    # a message of a client that knows nothing of control variates
    plain = ClientSession("b", make_spec(), SCHEMA)
    sent = plain.finish(
        0, coordinator.record.adapter_digest, torch.ones(SIZE), fisher=None, num_examples=1, max_bytes=None
    )
    mailbox.post_update(0, "b", sent.message)
    assert coordinator.close_round() is None
    assert "carries no control variate" in coordinator._round.collect().refused[0].reason


def test_a_damaged_file_is_refused(tmp_path):
    mailbox = found(tmp_path, **SHARED)
    coordinator = Coordinator(mailbox)
    client = Client(mailbox, "a", 1.0)
    client.step()
    coordinator.close_round()
    (tmp_path / "rounds" / "000001" / VARIATE_FILE).write_bytes(adapter_file.dump(initial_state()))
    with pytest.raises(MailboxError, match=r"control_variate\.safetensors of round 1 cannot be read: its sha256"):
        client.step()


@pytest.mark.parametrize("payload", [b"", b"\x01\x00\x00", b"\x05\x00\x00\x00abcd", b"\xff\xff\xff\xff" + b"a" * 9])
def test_malformed_pairs(payload):
    with pytest.raises(MessageError, match="says that its first part ends"):
        split_pair(payload)


def test_pairs():
    assert split_pair(join_pair(b"abc", b"de")) == (b"abc", b"de")
    assert split_pair(join_pair(b"", b"")) == (b"", b"")

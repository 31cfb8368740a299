"""Every way to Θ_t ends in the bits that the coordinator published, or is left for the plain adapter file."""

import dataclasses
import hashlib

import pytest
import torch
from light import SCHEMA, LightClient, fake_training, found, initial_state, make_spec, run_rounds

from fedfstq_hf.codec import Schema, message
from fedfstq_hf.errors import MessageError
from fedfstq_hf.federation import adapter_file, frames
from fedfstq_hf.federation.client.downlink import HELD_FILE
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.protocol import FRAME_FILE, RESIDUAL_FILE
from fedfstq_hf.federation.record import KEYFRAME, MESSAGES, STEP, Frame, RoundRecord, listed
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.server.framing import product_weights

LOSSY = {"keyframe": 64, "longest": 20.0}


def record_of(mailbox, round):
    return RoundRecord.from_json(mailbox.read(round, "round.json"))


def kinds(mailbox, rounds):
    """The kind of each round's frame, None where it has none."""
    found = []
    for round in range(1, rounds + 1):
        frame = next((frame for frame in record_of(mailbox, round).frames if frame.round == round), None)
        found.append(frame and frame.kind)
    return found


def run(path, rounds=6, clients="ab", until=None, **settings):
    mailbox = found(path / "box", rounds=rounds, **({"codec": "topk", "downlink": "exact"} | settings))
    coordinator = Coordinator(mailbox)
    people = [LightClient(mailbox, name, path / name, max_bytes=300) for name in clients]
    run_rounds(coordinator, people, until)
    return mailbox, coordinator, people


def test_the_digest_is_of_the_vector_under_its_schema():
    schema = Schema.from_state_dict({"w": torch.zeros(2)})
    values = bytes.fromhex("0000803f000000c0")  # 1 and -2
    expected = hashlib.sha256(b"fedfstq adapter\n" + bytes.fromhex(schema.fingerprint) + values).hexdigest()
    assert schema.digest(torch.tensor([1.0, -2.0])) == expected
    assert Schema.from_state_dict({"v": torch.zeros(2)}).digest(torch.tensor([1.0, -2.0])) != expected


# The cheapest way

M, S, K = (lambda r, n, kind=kind: Frame(r, kind, n) for kind in (MESSAGES, STEP, KEYFRAME))


@pytest.mark.parametrize(
    ("held", "frames", "initial", "expected"),
    [
        (5, (), 0, ((), 0)),  # it is at hand
        (4, (M(5, 10),), 0, ((5,), 10)),
        (3, (M(4, 20), M(5, 10)), 0, ((4, 5), 30)),
        (None, (M(4, 20), M(5, 10)), 0, (None, 100)),  # Θ_3 is not at hand
        (2, (M(4, 20), M(5, 10)), 0, (None, 100)),
        (4, (M(5, 100),), 0, (None, 100)),  # no better than the plain file
        (None, tuple(M(r, 5) for r in range(1, 6)), 0, ((1, 2, 3, 4, 5), 25)),  # all the way from Θ_0
        (None, tuple(M(r, 5) for r in range(1, 6)), 80, (None, 100)),  # which costs too much
        (0, tuple(M(r, 5) for r in range(1, 6)), 80, ((1, 2, 3, 4, 5), 25)),
        (None, (K(4, 30), M(5, 10)), 0, ((4, 5), 40)),
        (None, (K(4, 30), M(5, 10)), 70, (None, 100)),
        (4, (K(4, 30), M(5, 10)), 0, ((5,), 10)),
        (3, (K(4, 30), S(5, 10)), 0, ((4, 5), 40)),  # no step leads to a keyframe
        (6, (M(5, 10),), 0, (None, 100)),
    ],
)
def test_the_cheapest_way_to_round_five(held, frames, initial, expected):
    record = RoundRecord(5, "", "", 100, "", 0.0, None, False, frames=frames)
    path = record.path_from(held, initial)
    assert (None if path.frames is None else tuple(frame.round for frame in path.frames), path.num_bytes) == expected


def test_a_record_names_what_may_be_needed():
    assert listed((), M(1, 10), 100) == (M(1, 10),)
    assert listed((M(1, 10),), M(2, 10), 100) == (M(1, 10), M(2, 10))
    assert listed((M(1, 60),), M(2, 50), 100) == (M(2, 50),)  # together no better than the plain file
    assert listed((M(1, 10),), K(2, 50), 100) == (K(2, 50),)
    assert listed((K(1, 10), S(2, 5)), S(3, 5), 100) == (K(1, 10), S(2, 5), S(3, 5))
    assert listed((M(1, 10),), None, 100) == ()


# Frames lead where the published adapter is


def test_a_round_s_messages_lead_to_its_adapter_bit_for_bit(tmp_path):
    mailbox, coordinator, clients = run(
        tmp_path, server={"optimizer": "SGD", "lr": 1.7, "final_lr": 1.0}, weights="precision", clip=1.0
    )
    assert kinds(mailbox, 6) == [MESSAGES] * 6
    records = [record_of(mailbox, round) for round in range(7)]
    assert any(entry.scale < 1 for record in records for entry in record.accepted)
    for client in clients:
        assert torch.equal(client.participation.final_adapter(), coordinator.adapter)
        spent = records[0].adapter_bytes + sum(record.frames[-1].num_bytes for record in records[1:])
        assert client.participation.downlink.num_bytes == spent < 4 * records[0].adapter_bytes


def test_messages_of_earlier_rounds_count_as_the_server_counted_them(tmp_path):
    mailbox = found(tmp_path / "box", rounds=3, codec="topk", max_staleness=2, downlink="exact", min_clients=1)
    coordinator = Coordinator(mailbox)
    slow, quick = (LightClient(mailbox, name, tmp_path / name, max_bytes=300) for name in "ab")
    assignment = slow.participation.next()
    run_rounds(coordinator, [quick], 1)
    slow.participation.complete(assignment, fake_training(assignment.adapter, assignment.seed, {}))
    quick.step()
    assert [entry.staleness for entry in coordinator.close_round().accepted] == [1, 0]
    assert kinds(mailbox, 2) == [MESSAGES, MESSAGES]
    assert torch.equal(quick.participation.next().adapter, coordinator.adapter)
    assert quick.participation.downlink.num_bytes < 3 * record_of(mailbox, 0).adapter_bytes


@pytest.mark.parametrize("server", [{"optimizer": "SGD", "lr": 1.0, "momentum": 0.9}, {"optimizer": "FedAdam"}])
def test_no_messages_where_the_step_does_not_follow_from_them(tmp_path, server):
    mailbox, coordinator, clients = run(tmp_path, rounds=2, server=server)
    assert kinds(mailbox, 2) == [None, None]
    assert torch.equal(clients[0].participation.final_adapter(), coordinator.adapter)


def test_the_published_adapter_is_what_a_keyframe_decodes_to(tmp_path):
    mailbox, coordinator, clients = run(tmp_path, downlink=LOSSY | {"longest": 1.0})
    assert kinds(mailbox, 6) == [KEYFRAME] * 6
    record = record_of(mailbox, 6)
    initial, _ = frames.initial_adapter(mailbox, record_of(mailbox, 0), coordinator.spec, SCHEMA)
    data = mailbox.read(6, FRAME_FILE)
    assert 64 < len(message.unpack(data)[1]) <= 128  # the last one
    assert len(message.unpack(mailbox.read(5, FRAME_FILE))[1]) <= 64
    decoded = frames.apply(data, record.frames[-1], initial, coordinator.spec, SCHEMA)
    published = adapter_file.load(mailbox.read(6, "adapter_model.safetensors"))
    assert torch.equal(decoded, SCHEMA.flatten(published))
    late = LightClient(mailbox, "c", tmp_path / "c", max_bytes=300)
    for client in (*clients, late):
        assert torch.equal(client.participation.final_adapter(), decoded)


def test_what_a_keyframe_leaves_out_is_made_up_for(tmp_path):
    """The server's residual closes the loop: published plus residual is the state of exact steps along the way."""
    mailbox, coordinator, _ = run(tmp_path, downlink=LOSSY | {"longest": 1.0}, until=1)
    exact, direct, _ = run(tmp_path / "exact", until=1)
    residual = adapter_file.load_tensors(mailbox.read(1, RESIDUAL_FILE), "it", max_header=1000, error=MessageError)
    assert torch.allclose(coordinator.adapter + residual["residual"], direct.adapter, atol=1e-6)
    assert float(residual["residual"].norm()) > 0
    assert record_of(exact, 1).residual_sha256 is None


def test_rounds_between_keyframes_are_exact_and_cheap(tmp_path):
    mailbox, coordinator, clients = run(tmp_path, rounds=8, downlink=LOSSY)
    found_kinds = kinds(mailbox, 8)
    assert set(found_kinds) == {MESSAGES, KEYFRAME}
    most = LOSSY["longest"] * LOSSY["keyframe"]
    for round in range(1, 9):
        record = record_of(mailbox, round)
        assert record.path_from(None).num_bytes <= max(most, record.frames[-1].num_bytes)
    for client in clients:
        assert torch.equal(client.participation.final_adapter(), coordinator.adapter)


def test_steps_where_messages_are_for_nobody_else(tmp_path):
    momentum = {"optimizer": "SGD", "lr": 1.0, "momentum": 0.5}
    mailbox, coordinator, clients = run(tmp_path, server=momentum, downlink=LOSSY | {"step": 40})
    assert STEP in kinds(mailbox, 6)
    assert MESSAGES not in kinds(mailbox, 6)
    for client in clients:
        assert torch.equal(client.participation.final_adapter(), coordinator.adapter)


def test_a_restarted_coordinator_publishes_the_same(tmp_path):
    straight, _, _ = run(tmp_path / "straight", downlink=LOSSY)
    mailbox = found(tmp_path / "box", rounds=6, codec="topk", downlink=LOSSY)
    clients = [LightClient(mailbox, name, tmp_path / name, max_bytes=300) for name in "ab"]
    for _ in range(6):
        run_rounds(Coordinator(mailbox), clients, 1)
    for round in range(7):
        one, two = record_of(straight, round), record_of(mailbox, round)
        assert (one.adapter_sha256, one.frames) == (two.adapter_sha256, two.frames)


def test_after_a_rollback_clients_hold_what_was_restored(tmp_path):
    mailbox, coordinator, clients = run(tmp_path, rounds=9, downlink=LOSSY | {"longest": 1.0}, until=3)
    coordinator.rollback(2)
    one, two = record_of(mailbox, 2), record_of(mailbox, 4)
    assert (two.adapter_sha256, two.residual_sha256, two.frames) == (one.adapter_sha256, one.residual_sha256, ())
    run_rounds(coordinator, clients, 2)
    for client in clients:
        assert torch.equal(client.participation.final_adapter(), coordinator.adapter)


# A client keeps what it holds


def test_a_restart_downloads_nothing_again(tmp_path):
    mailbox, coordinator, clients = run(tmp_path, until=3)
    again = LightClient(mailbox, "z", tmp_path / "z", max_bytes=300)
    first = again.participation.next().adapter
    spent = again.participation.downlink.num_bytes
    again.session.close()
    restarted = LightClient(mailbox, "z", tmp_path / "z", max_bytes=300)
    assert torch.equal(restarted.participation.next().adapter, first)
    assert (spent > 0, restarted.participation.downlink.num_bytes) == (True, 0)
    run_rounds(coordinator, clients, 1)
    restarted.session.close()
    later = LightClient(mailbox, "z", tmp_path / "z", max_bytes=300)
    assert torch.equal(later.participation.next().adapter, coordinator.adapter)
    assert later.participation.downlink.num_bytes == record_of(mailbox, 4).frames[-1].num_bytes


@pytest.mark.parametrize("damage", [b"", b"nothing", "flipped", "another adapter"])
def test_what_is_held_and_damaged_is_downloaded_again(tmp_path, damage):
    mailbox, coordinator, clients = run(tmp_path, until=2)
    file = tmp_path / "a" / HELD_FILE
    data = file.read_bytes()
    if damage == "flipped":
        damage = data[:-1] + bytes([data[-1] ^ 1])
    elif damage == "another adapter":
        damage = (tmp_path / "b" / HELD_FILE).read_bytes()[: len(data)][::-1]
    file.write_bytes(damage)
    clients[0].session.close()
    again = LightClient(mailbox, "a", tmp_path / "a", max_bytes=300)
    assert torch.equal(again.participation.final_adapter(), coordinator.adapter)


# Whatever does not check costs the plain file, and no more


@pytest.mark.parametrize("damage", ["flipped", "missing", "of another round", "short", "long"])
@pytest.mark.parametrize("settings", [{}, {"downlink": LOSSY | {"longest": 1.0}}], ids=["messages", "keyframe"])
def test_a_damaged_frame_only_costs_the_whole_adapter(tmp_path, damage, settings, caplog):
    mailbox, coordinator, clients = run(tmp_path, until=1, **settings)
    run_rounds(coordinator, [*clients[1:], LightClient(mailbox, "c", tmp_path / "c", max_bytes=300)], 1)
    path = tmp_path / "box/rounds/000002" / FRAME_FILE
    data = path.read_bytes()
    changed = {
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "of another round": (tmp_path / "box/rounds/000001" / FRAME_FILE).read_bytes(),
        "short": data[:-1],
        "long": data + b"x",
    }
    path.unlink()
    if damage != "missing":
        path.write_bytes(changed[damage])
    assignment = clients[0].participation.next()
    assert assignment.round == 2
    assert torch.equal(assignment.adapter, coordinator.adapter)
    assert "the whole adapter is downloaded instead" in caplog.text


def test_a_frame_that_somebody_made_up_is_refused(tmp_path):
    """Every field is right but one; digests are made anew each time."""
    mailbox, coordinator, _ = run(tmp_path, until=2)
    record = record_of(mailbox, 2)
    frame, data = record.frames[-1], mailbox.read(2, FRAME_FILE)
    header, payload = message.unpack(data)
    adapter = SCHEMA.flatten(adapter_file.load(mailbox.read(1, "adapter_model.safetensors")))
    assert torch.equal(frames.apply(data, frame, adapter, coordinator.spec, SCHEMA), coordinator.adapter)
    other = [
        ({"round": 3}, payload),
        ({"base": "0" * 64}, payload),
        ({"schema": "0" * 64}, payload),
        ({"codec": "fp32"}, payload),
        ({"client_id": "a"}, payload),
        ({"params": {}}, payload),
        ({"params": {"frame": KEYFRAME}}, payload),
        ({}, b""),
        ({}, b"\xff\xff\xff\xff" + payload[4:]),
        ({}, b"\x00\x00\x00\x00" + payload[4:]),
        ({}, payload[:-1]),
        ({}, payload + b"x"),
        ({}, payload[:12] + bytes.fromhex("000000000000f07f") + payload[20:]),  # a weight of infinity
        ({}, payload[:12] + bytes.fromhex("000000000000f0bf") + payload[20:]),  # of -1
        ({}, payload[:20] + bytes.fromhex("000000000000f87f") + payload[28:]),  # a scale of NaN
    ]
    for changes, content in other:
        forged = message.pack(dataclasses.replace(header, **changes), content)
        with pytest.raises(MessageError):
            frames.apply(forged, frame._replace(num_bytes=len(forged)), adapter, coordinator.spec, SCHEMA)


# Θ_0 of a seed


def test_a_drawn_adapter_is_the_same_everywhere_and_begins_as_peft_s():
    vector = frames.drawn(SCHEMA, 7)
    state = SCHEMA.unflatten(vector)
    a, b = state["layer.lora_A.weight"], state["layer.lora_B.weight"]
    assert not b.any()
    bound = 24**-0.5
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.9 * bound
    assert abs(float(a.mean())) < 0.3 * bound
    assert not torch.equal(vector, frames.drawn(SCHEMA, 8))
    # numpy's PCG64 and rounded products: no library of this machine has a say
    assert SCHEMA.digest(vector) == "39b19b333e2e134b39ac154c6a5ed9ea1f7ebda85768b4b46019e056809db62d"


@pytest.mark.parametrize(
    "other",
    [
        {"head.weight": torch.zeros(2)},
        {"y.lora_A.weight": torch.zeros(2, 2, dtype=torch.bfloat16)},
        {"x.lora_magnitude_vector.weight": torch.zeros(2)},
    ],
)
def test_what_no_seed_gives_is_not_drawn(other):
    state = {"x.lora_A.weight": torch.zeros(2, 2), "x.lora_B.weight": torch.zeros(2, 2)}
    assert frames.drawn(Schema.from_state_dict(state), 0) is not None
    assert frames.drawn(Schema.from_state_dict(state | other), 0) is None


def test_a_newcomer_to_a_drawn_federation_downloads_no_adapter(tmp_path):
    mailbox = FolderMailbox(tmp_path / "box", durable=False)
    spec = make_spec(rounds=4, codec="topk", seed=3, downlink=LOSSY)
    found_federation(mailbox, spec, adapter_file.dump(SCHEMA.unflatten(frames.drawn(SCHEMA, 3))), b"{}\n", now=0.0)
    coordinator = Coordinator(mailbox)
    run_rounds(coordinator, [LightClient(mailbox, name, tmp_path / name, max_bytes=300) for name in "ab"])
    new = LightClient(mailbox, "c", tmp_path / "c")
    assert torch.equal(new.participation.final_adapter(), coordinator.adapter)
    assert new.participation.downlink.num_bytes == coordinator.record.path_from(None).num_bytes
    begun = LightClient(mailbox, "d", tmp_path / "d")
    assert torch.equal(begun.participation.downlink.adapter(record_of(mailbox, 0)), frames.drawn(SCHEMA, 3))


def test_another_adapter_than_the_drawn_one_is_downloaded_once(tmp_path):
    mailbox, coordinator, _ = run(tmp_path, downlink=LOSSY | {"longest": 1.0}, until=2)
    new = LightClient(mailbox, "c", tmp_path / "c", max_bytes=300)
    assert torch.equal(new.participation.next().adapter, coordinator.adapter)
    assert initial_state()["layer.lora_B.weight"].any()


# What bits are spent on


def test_errors_weigh_what_they_change_in_the_product():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 24, generator=generator), torch.randn(24, 4, generator=generator)
    state = {"layer.lora_A.weight": a, "layer.lora_B.weight": b}
    weights = SCHEMA.unflatten(product_weights(SCHEMA, SCHEMA.flatten(state)))
    expected_a = b.square().sum(0)[:, None].expand(4, 24)
    expected_b = a.square().sum(1)[None].expand(24, 4)
    scale = torch.cat([expected_a.reshape(-1), expected_b.reshape(-1)]).mean()
    assert torch.allclose(weights["layer.lora_A.weight"], expected_a / scale, rtol=1e-5)
    assert torch.allclose(weights["layer.lora_B.weight"], expected_b / scale, rtol=1e-5)
    untrained = SCHEMA.unflatten(product_weights(SCHEMA, SCHEMA.flatten(state | {"layer.lora_B.weight": 0 * b})))
    assert float(untrained["layer.lora_A.weight"].max()) == 1 / 16
    assert not product_weights(SCHEMA, torch.zeros(SCHEMA.num_params)).sub(1).any()


def test_no_more_is_read_of_a_frame_than_an_adapter_has(tmp_path, monkeypatch):
    """Sizes in a record are a mailbox's own words."""
    mailbox, coordinator, clients = run(tmp_path, until=2)
    record = record_of(mailbox, 2)
    frames_ = tuple(frame._replace(num_bytes=10**15) for frame in record.frames)
    record = dataclasses.replace(record, adapter_bytes=10**18, frames=frames_)
    asked, read = [], mailbox.read
    monkeypatch.setattr(mailbox, "read", lambda *where, max_bytes: asked.append(max_bytes) or read(*where))
    new = clients[0].participation.downlink
    new._held = 1, SCHEMA.flatten(adapter_file.load(read(1, "adapter_model.safetensors")))
    assert torch.equal(new.adapter(record), coordinator.adapter)
    assert max(asked) <= adapter_file.most_bytes(SCHEMA)

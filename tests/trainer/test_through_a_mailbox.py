"""Rounds through a mailbox: what is sent, logged and published, and that the same seed gives the same bytes."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import make_tiny_data, make_tiny_model
from tiny_federation import batch_of, found, make_trainer, run, serve, snapshot
from transformers import TrainerCallback

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.codec import get_codec, message
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import adapter_file


def test_a_federation_of_one(tmp_path):
    mailbox = found(tmp_path / "box", rounds=3)
    trainer = run(tmp_path, mailbox, arguments={"logging_strategy": "steps", "logging_steps": 1})
    assert mailbox.head() == 3
    assert trainer.state.global_step == 6
    assert [settlement.outcome for settlement in trainer.settlements] == ["accepted"] * 3
    final = adapter_file.load((tmp_path / "box/adapter_model.safetensors").read_bytes())
    assert torch.equal(trainer.adapter_view.read(), trainer.adapter_view.schema.flatten(final))
    (ref,) = mailbox.list_updates(2)
    header, payload = message.unpack(mailbox.read_update(ref, max_bytes=10**9))
    assert (header.round, header.client_id, header.num_examples) == (2, "a", 7)
    assert get_codec("fp32").decode(payload, trainer.adapter_view.schema).to_dense().any()


def test_every_round_reaches_the_log(tmp_path):
    mailbox = found(tmp_path / "box", rounds=3)
    trainer = run(tmp_path, mailbox, arguments={"logging_strategy": "steps"})  # every 500 steps: never
    rows = {row["fed_round"]: row for row in trainer.state.log_history if "fed_round" in row}
    assert sorted(rows) == [0, 1, 2]
    for round, row in rows.items():
        assert row["fed_uplink_bytes"] == mailbox.list_updates(round)[0].num_bytes


def test_metrics_reach_reporters(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    mailbox = found(tmp_path / "box")
    thread = serve(mailbox)
    trainer = make_trainer(tmp_path, mailbox, arguments={"logging_strategy": "steps", "logging_steps": 1})
    trainer.add_callback(Reporter())
    trainer.train()
    thread.join(30)
    assert any(logs.get("fed_round") == 1 and logs["fed_uplink_bytes"] > 0 for logs in seen)


def test_the_published_adapter_loads_with_plain_peft_and_gives_equal_logits(tmp_path):
    mailbox = found(tmp_path / "box")
    trainer = run(tmp_path, mailbox)
    ids = batch_of(make_tiny_data(3, seed=9))["input_ids"]
    loaded = PeftModel.from_pretrained(make_tiny_model().unload(), tmp_path / "box")
    with torch.no_grad():
        mine, theirs = (model.eval()(ids).logits for model in (trainer.model, loaded))
        start = make_tiny_model().eval()(ids).logits
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, start)


@pytest.mark.parametrize(("codec", "budget", "least"), [("fp32", None, 0.2), ("fstq", "0.5bpp", 0.1)])
def test_it_learns(tmp_path, codec, budget, least):
    data = make_tiny_data(8)
    batch = batch_of(data)

    def loss(model):
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss(make_tiny_model(r=8))
    mailbox = found(tmp_path / "box", make_tiny_model(r=8), codec=codec, rounds=6, local_steps=10, uplink_budget=budget)
    trainer = run(tmp_path, mailbox, model=make_tiny_model(r=8), data=data)
    assert loss(trainer.model) < before - least


def test_two_runs_of_one_seed_give_the_same_bytes(tmp_path):
    def federation(name, seed=0, noise=0):
        torch.manual_seed(noise)  # the process's own random state must not matter
        path = tmp_path / name
        mailbox = found(
            path / "box", make_tiny_model(lora_dropout=0.2), codec="fstq", uplink_budget="1kB", seed=seed, rounds=3
        )
        torch.manual_seed(noise)
        run(path, mailbox, model=make_tiny_model(lora_dropout=0.2), arguments={"seed": noise})
        return snapshot(path / "box", mailbox)

    first = federation("one", noise=1)
    assert federation("two", noise=2) == first
    assert federation("three", seed=1) != first
    assert len(set(first)) == 4


def test_two_clients_and_the_weighted_mean(tmp_path):
    mailbox = found(tmp_path / "box", rounds=1, min_clients=2)
    thread = serve(mailbox)
    with pytest.raises(MailboxError, match="No new round"):  # it leaves its message, and would wait for b's
        make_trainer(tmp_path, mailbox, data=make_tiny_data(3, seed=3), wait_seconds=0).train()
    make_trainer(tmp_path, mailbox, client_id="b", data=make_tiny_data(9, seed=9)).train()
    thread.join(30)
    record = json.loads(mailbox.read(1, "round.json"))
    assert [(u["client_id"], u["weight"]) for u in record["accepted"]] == [("a", 0.25), ("b", 0.75)]
    view = AdapterView(make_tiny_model())
    deltas = []
    for ref in mailbox.list_updates(0):
        _, payload = message.unpack(mailbox.read_update(ref, max_bytes=10**9))
        deltas.append(get_codec("fp32").decode(payload, view.schema).to_dense())
    mean = ((3 * deltas[0].double() + 9 * deltas[1].double()) / 12).float()
    published = view.schema.flatten(adapter_file.load(mailbox.read(1, "adapter_model.safetensors")))
    assert torch.equal(published, view.read() + mean)


def test_user_arguments_come_back_after_a_federation(tmp_path):
    trainer = run(tmp_path, found(tmp_path / "box"), arguments={"max_steps": 77})
    assert trainer.args.max_steps == 77


def test_a_hugging_face_dataset_with_more_columns(tmp_path):
    rows = [row | {"specialty": "x"} for row in make_tiny_data(7)]
    one, two = found(tmp_path / "one/box"), found(tmp_path / "two/box")
    run(tmp_path / "one", one, data=Dataset.from_list(rows), arguments={"remove_unused_columns": True})
    run(tmp_path / "two", two)
    assert snapshot(tmp_path / "one/box", one) == snapshot(tmp_path / "two/box", two)


def test_a_shard_smaller_than_a_batch(tmp_path):
    mailbox = found(tmp_path / "box")
    trainer = run(tmp_path, mailbox, data=make_tiny_data(1), arguments={"per_device_train_batch_size": 4})
    assert trainer.state.global_step == 4

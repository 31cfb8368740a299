"""FedFSTQTrainer: what a step gives away, how rounds are cut, and what it refuses."""

import hashlib
import json
import threading

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tiny import make_arguments, make_tiny_data, make_tiny_model
from transformers import Trainer, TrainerCallback

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.adapter import AdapterView, base_fingerprint, config_json
from fedfstq_hf.codec import get_codec, message
from fedfstq_hf.errors import AdapterMismatchError, BudgetError, ConfigError, DataError, MailboxError, NonFiniteError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.client import Assignment, local_seed
from fedfstq_hf.federation.coordinator import Coordinator
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.local import FolderMailbox
from fedfstq_hf.federation.session import ClientSession
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.trainer import FedFSTQMixin

# Helpers


def make_spec(model, **changes):
    settings = {
        "name": "tiny",
        "model": "org/tiny",
        "base_fingerprint": base_fingerprint(model),
        "schema": AdapterView(model).schema.fingerprint,
        "rounds": 2,
        "local_steps": 2,
        "max_message_bytes": 100_000,
        "codec": "fp32",
    }
    return FederationSpec(**(settings | changes))


def found(path, model=None, **changes):
    model = model or make_tiny_model()
    view = AdapterView(model)
    mailbox = FolderMailbox(path, durable=False)
    found_federation(
        mailbox, make_spec(model, **changes), adapter_file.dump(view.state()), config_json(model, view.name)
    )
    return mailbox


def make_trainer(
    tmp_path, mailbox=None, *, model=None, data=None, client_id="a", arguments=None, wait_seconds=30, **config
):
    address = None if mailbox is None else str(mailbox.path)
    federation = FedFSTQConfig(
        mailbox=address, client_id=client_id, poll_seconds=0.01, wait_seconds=wait_seconds, **config
    )
    return FedFSTQTrainer(
        model=model or make_tiny_model(),
        args=make_arguments(tmp_path / client_id, **(arguments or {})),
        train_dataset=make_tiny_data(7) if data is None else data,
        federation=federation,
    )


def serve(mailbox):
    """A coordinator in a thread; join it after the clients."""
    thread = threading.Thread(target=lambda: Coordinator(mailbox).serve(poll_seconds=0.01), daemon=True)
    thread.start()
    return thread


def run(tmp_path, mailbox, **options):
    thread = serve(mailbox)
    trainer = make_trainer(tmp_path, mailbox, **options)
    trainer.train()
    thread.join(30)
    assert not thread.is_alive()
    return trainer


class Listed:
    """A participation that hands out given rounds of one client from an adapter in memory."""

    def __init__(self, model, hands_out, **spec):
        self.view = AdapterView(model)
        self.spec = make_spec(model, **spec)
        self.session = ClientSession("a", self.spec, self.view.schema)
        self.total_steps = len(hands_out) * self.spec.local_steps
        self.rounds = list(hands_out)
        self.adapter = self.view.read()
        self.results = []

    def next(self):
        if not self.rounds:
            return None
        round = self.rounds.pop(0)
        return Assignment(
            round=round,
            session=self.session,
            adapter=self.adapter,
            adapter_sha256="",
            seed=local_seed(self.spec.seed, "a", round),
        )

    def complete(self, assignment, result):
        self.results.append(result)
        self.adapter = result.adapter
        self.session.carried = result.carried
        return {"fed_round": assignment.round}

    def final_adapter(self):
        return None


def take_part(tmp_path, rounds=(0,), *, spec=None, model=None, **options):
    model = model or make_tiny_model()
    participation = Listed(model, rounds, **(spec or {}))
    trainer = make_trainer(tmp_path, model=model, **options)
    trainer.take_part(participation, participation.spec)
    return trainer, participation


def ragged_data(num=16, length=12):
    """Rows with 1 to 10 target tokens: weights that a mean of means would get wrong."""
    rows = make_tiny_data(num, length=length)
    for number, row in enumerate(rows):
        kept = 1 + (7 * number) % 10
        row["labels"] = [-100] * (length - kept) + row["input_ids"][length - kept :]
    return rows


class Gradients(TrainerCallback):
    """Adapter gradients before each optimizer step, in double precision."""

    def __init__(self, view):
        self.view, self.seen = view, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append(torch.cat([g.detach().double().reshape(-1) for g in self.view.gradients()]))


def batch_of(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels", "attention_mask")}


# What a step gives away


@pytest.mark.parametrize("federated", [True, False])
def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path, federated):
    """16 x 1 and 4 x 4 and 1 x 16 examples, with ragged labels: equal gradients, Fisher and token sensitivity."""

    def gradients(size, steps):
        model = make_tiny_model()
        # The same examples in the same order however they are batched, also without a federation.
        arguments = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_grad_norm": 0.0,
            "max_steps": 1,
            "train_sampling_strategy": "sequential",
        }
        trainer = make_trainer(tmp_path, model=model, data=ragged_data(), arguments=arguments)
        watch = Gradients(trainer.adapter_view)
        trainer.add_callback(watch)
        if federated:
            participation = Listed(model, [0], local_steps=1, training={"max_grad_norm": 0.0})
            trainer.take_part(participation, participation.spec)
        else:
            trainer.train()
        assert len(watch.seen) == 1
        return watch.seen[0], trainer.adapter_fisher.vector().double()

    reference, fisher = gradients(16, 1)
    assert float(reference.abs().max()) > 1e-3
    for size, steps in ((4, 4), (1, 16)):
        other, other_fisher = gradients(size, steps)
        assert float((other - reference).abs().max()) <= 1e-6 * float(reference.abs().max())
        assert float((other_fisher - fisher).abs().max()) <= 3e-6 * float(fisher.abs().max())


def hand_computed(model, rows):
    """Loss gradients at the adapter and at the input embeddings, by one plain forward and backward pass."""
    view, batch = AdapterView(model), batch_of(rows)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    model.train()
    output = model(inputs_embeds=embeddings, labels=batch["labels"], attention_mask=batch["attention_mask"])
    output.loss.backward()
    adapter = torch.cat([gradient.reshape(-1) for gradient in view.gradients()]).clone()
    model.zero_grad()
    return adapter, embeddings.grad.square().sum(dim=-1)


def test_fisher_sees_gradients_before_clipping(tmp_path):
    rows = make_tiny_data(2)
    expected, _ = hand_computed(make_tiny_model(), rows)
    model = make_tiny_model()
    participation = Listed(model, [0], local_steps=1, training={"max_grad_norm": 1e-7})
    trainer = make_trainer(tmp_path, model=model, data=rows)
    watch = Gradients(trainer.adapter_view)
    trainer.add_callback(watch)
    trainer.take_part(participation, participation.spec)
    assert float(watch.seen[0].norm()) < 1.1e-7
    fisher = participation.results[0].fisher
    assert torch.allclose(fisher, expected.square(), rtol=1e-4, atol=1e-12)
    assert float(fisher.max()) > 1e-6


def test_token_sensitivity_is_the_gradient_at_the_embeddings(tmp_path):
    rows = make_tiny_data(2)
    rows[1]["input_ids"][3] = rows[0]["input_ids"][5]  # an id that occurs twice
    for row in rows:
        row["labels"] = [-100] * 2 + row["input_ids"][2:]
    rows[1]["attention_mask"][-2:] = [0, 0]
    rows[1]["labels"][-2:] = [-100, -100]
    _, squared = hand_computed(make_tiny_model(), rows)
    trainer, _ = take_part(tmp_path, data=rows, spec={"local_steps": 1})
    with pytest.raises(ConfigError, match="processing_class=tokenizer"):
        trainer.token_sensitivity()
    scores = trainer.sensitivity.scores()
    seen: dict[int, list[float]] = {}
    for row, values in zip(rows, squared, strict=True):
        for token, value, kept in zip(row["input_ids"], values.tolist(), row["attention_mask"], strict=True):
            if kept:
                seen.setdefault(token, []).append(value)
    assert any(len(values) > 1 for values in seen.values())
    for token in range(64):
        if token in seen:
            assert scores[token].item() == pytest.approx(sum(seen[token]) / len(seen[token]), rel=1e-4)
        else:
            assert scores[token].item() == torch.inf


def test_sensitivity_is_read_at_refresh_steps_only(tmp_path):
    rows = make_tiny_data(2)
    every, _ = take_part(tmp_path, data=rows, spec={"local_steps": 6, "refresh_steps": 1})
    third, _ = take_part(tmp_path, data=rows, spec={"local_steps": 6, "refresh_steps": 3})
    count = [int(trainer.sensitivity.state_dict()["count"].max()) for trainer in (every, third)]
    assert count == [6, 2]


def test_the_federation_s_decay_wins(tmp_path):
    """With rho 0 both averages are those of the last step alone."""
    rows, one_step = make_tiny_data(2), {"local_steps": 1, "refresh_steps": 1, "rho": 0.0}
    both, participation = take_part(tmp_path, [0, 1], data=rows, spec=one_step, rho=0.9)
    second, last = take_part(tmp_path, [1], data=rows, spec=one_step, model=_with(participation.results[0].adapter))
    assert torch.equal(both.sensitivity.scores(), second.sensitivity.scores())
    assert torch.equal(participation.results[1].fisher, last.results[0].fisher)


def _with(adapter):
    model = make_tiny_model()
    AdapterView(model).write(adapter)
    return model


def test_sensitivity_is_carried_to_the_next_round(tmp_path):
    trainer, participation = take_part(tmp_path, [0, 1, 2], data=make_tiny_data(2), spec={"local_steps": 2})
    assert int(trainer.sensitivity.state_dict()["count"].max()) == 3
    carried = participation.results[-1].carried
    assert torch.equal(carried["tokens.ema"], trainer.sensitivity.state_dict()["ema"])


@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_reading_them_costs_no_extra_pass(tmp_path, monkeypatch, arguments):
    arguments = {"gradient_accumulation_steps": 2, **arguments}

    def passes(train):
        counts = {"forward": 0, "backward": 0}
        model = make_tiny_model()
        model.get_base_model().lm_head.register_forward_hook(lambda *a: counts.update(forward=counts["forward"] + 1))
        original = torch.Tensor.backward

        def backward(*args, **kwargs):
            counts["backward"] += 1
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", backward)
            train(model)
        return counts

    def plain(model):
        settings = make_arguments(tmp_path, max_steps=4, **arguments)
        Trainer(model=model, args=settings, train_dataset=make_tiny_data(7)).train()

    def federated(model):
        spec = {"local_steps": 2, "refresh_steps": 1}
        trainer, _ = take_part(tmp_path, [0, 1], model=model, spec=spec, arguments=arguments)
        assert int(trainer.sensitivity.state_dict()["count"].max()) > 0
        assert trainer.state.global_step == 4

    assert passes(federated) == passes(plain) == {"forward": 8, "backward": 8}


def test_training_is_that_of_a_plain_trainer(tmp_path):
    """Without a mailbox, probes and Fisher leave no trace: bit for bit, where the Trainer computes the loss."""

    class Own(Trainer):
        def compute_loss(self, *arguments, **keywords):
            return super().compute_loss(*arguments, **keywords)

    class Federated(FedFSTQMixin, Own):
        pass

    one, two = make_tiny_model(), make_tiny_model()
    Federated(model=one, args=make_arguments(tmp_path), train_dataset=make_tiny_data(7)).train()
    Trainer(model=two, args=make_arguments(tmp_path / "plain"), train_dataset=make_tiny_data(7)).train()
    assert torch.equal(AdapterView(one).read(), AdapterView(two).read())


# Without a mailbox


def test_local_training_packs_its_change(tmp_path):
    model = make_tiny_model()
    before = AdapterView(model).read()
    trainer = make_trainer(tmp_path, model=model, codec="fp32", client_id="hospital-a")
    trainer.train()
    header, payload = message.unpack(trainer.pack_update())
    view = trainer.adapter_view
    assert (header.client_id, header.num_examples, header.codec) == ("hospital-a", 7, "fp32")
    assert header.schema == view.schema.fingerprint
    assert header.base == hashlib.sha256(adapter_file.dump(view.schema.unflatten(before))).hexdigest()
    change = get_codec("fp32").decode(payload, view.schema).to_dense()
    assert torch.equal(change, view.read() - before)
    assert change.any()


@pytest.mark.parametrize("budget", ["700B", "2bpp", 1500])
def test_a_packed_change_keeps_its_budget(tmp_path, budget):
    trainer = make_trainer(tmp_path, uplink_budget=budget)
    trainer.train()
    data = trainer.pack_update()
    num_params = trainer.adapter_view.schema.num_params
    assert len(data) <= {"700B": 700, "2bpp": num_params // 4, 1500: 1500}[budget]
    header, payload = message.unpack(data)
    assert get_codec(header.codec).decode(payload, trainer.adapter_view.schema).nnz > 50


def test_packing_before_training_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing to pack yet: call train\(\) first"):
        make_trainer(tmp_path).pack_update()


def test_a_budget_below_the_header_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, uplink_budget=50)
    trainer.train()
    with pytest.raises(BudgetError):
        trainer.pack_update()


def test_a_second_train_packs_from_where_it_began(tmp_path):
    trainer = make_trainer(tmp_path, codec="fp32")
    trainer.train()
    middle = trainer.adapter_view.read()
    trainer.train()
    _, payload = message.unpack(trainer.pack_update())
    change = get_codec("fp32").decode(payload, trainer.adapter_view.schema).to_dense()
    assert torch.equal(change, trainer.adapter_view.read() - middle)


# Rounds through a mailbox


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


def snapshot(path, mailbox):
    messages = [
        mailbox.read_update(ref, max_bytes=10**9)
        for round in range(mailbox.head())
        for ref in mailbox.list_updates(round)
    ]
    return [hashlib.sha256(data).hexdigest() for data in (*messages, (path / "adapter_model.safetensors").read_bytes())]


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


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_and_steps_of_a_client_that_skips_rounds(tmp_path, name):
    """In round r it trains at the rates of the federation's steps r * E and after, whatever it missed."""
    training = {"lr_scheduler_type": name, "learning_rate": 1e-2, "warmup_steps": 3}
    spec = {"rounds": 6, "local_steps": 2, "training": training}
    logged = {"logging_strategy": "steps", "logging_steps": 1}

    def rates(rounds):
        trainer, _ = take_part(tmp_path, rounds, spec=spec, arguments=logged)
        return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]

    everything = rates(range(6))
    assert len(set(everything)) > 8
    assert rates([1, 4, 5]) == [everything[step] for step in (2, 3, 8, 9, 10, 11)]


def test_global_step_of_a_client_that_joins_late(tmp_path):
    mailbox = found(tmp_path / "box", rounds=3)
    with pytest.raises(MailboxError, match="nothing is lost"):
        make_trainer(tmp_path, mailbox, client_id="first", wait_seconds=0).train()
    Coordinator(mailbox).close_round()
    late = run(tmp_path, mailbox, client_id="late", arguments={"logging_strategy": "steps", "logging_steps": 1})
    assert late.state.global_step == 6
    rows = [row for row in late.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [3, 4, 5, 6]
    assert all(3.5 < row["loss"] < 4.5 for row in rows)  # the steps that it missed do not count into the means
    assert 3.5 < late.state.log_history[-1]["train_loss"] < 4.5


def test_a_client_that_joins_a_finished_federation_gets_the_adapter(tmp_path):
    mailbox = found(tmp_path / "box")
    one = run(tmp_path, mailbox)
    late = make_trainer(tmp_path, mailbox, client_id="late")
    late.train()
    assert torch.equal(late.adapter_view.read(), one.adapter_view.read())
    assert late.state.global_step == 0


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_kept_moments_make_rounds_one_long_training(tmp_path, optim):
    """Rounds of 2 x 3 steps with kept moments: the moments after them are those of the optimizer's sixth step."""
    spec = {"local_steps": 3, "optimizer_state": "kept", "training": {"optim": optim}}
    _, kept = take_part(tmp_path, [0, 1], spec=spec)
    _, fresh = take_part(tmp_path, [0, 1], spec=spec | {"optimizer_state": "fresh"})
    assert torch.equal(kept.results[0].adapter, fresh.results[0].adapter)
    same = torch.equal(kept.results[1].adapter, fresh.results[1].adapter)
    assert same == (optim == "sgd")
    assert not any(name.startswith("optimizer.") for name in fresh.results[1].carried)
    if optim == "adamw_torch":
        assert {float(value) for name, value in kept.results[1].carried.items() if name.endswith(".step")} == {6.0}


def test_kept_moments_survive_a_restart(tmp_path):
    def federation(name, restart):
        path = tmp_path / name
        mailbox = found(path / "box", rounds=2, optimizer_state="kept")
        if restart:
            with pytest.raises(MailboxError, match="No new round"):
                make_trainer(path, mailbox, wait_seconds=0).train()
        run(path, mailbox)
        return snapshot(path / "box", mailbox)

    assert federation("straight", False) == federation("restarted", True)


def test_a_callback_may_stop_it_and_a_second_train_goes_on(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                control.should_training_stop = True

    straight = found(tmp_path / "straight/box", rounds=3)
    run(tmp_path / "straight", straight)
    mailbox = found(tmp_path / "stopped/box", rounds=3)
    thread = serve(mailbox)
    trainer = make_trainer(tmp_path / "stopped", mailbox)
    stop = Stop()
    trainer.add_callback(stop)
    trainer.train()
    assert trainer.state.global_step == 3
    assert mailbox.head() <= 1
    trainer.remove_callback(stop)
    trainer.train()
    thread.join(30)
    assert snapshot(tmp_path / "stopped/box", mailbox) == snapshot(tmp_path / "straight/box", straight)


def test_user_arguments_come_back_after_a_federation(tmp_path):
    trainer = run(tmp_path, found(tmp_path / "box"), arguments={"max_steps": 77})
    assert trainer.args.max_steps == 77


def test_the_federation_s_training_arguments_win(tmp_path, caplog):
    caplog.set_level("INFO")
    mailbox = found(tmp_path / "box", training={"learning_rate": 0.125, "max_grad_norm": 0.5})
    trainer = run(tmp_path, mailbox, arguments={"learning_rate": 1e-2})
    assert (trainer.args.learning_rate, trainer.args.max_grad_norm) == (0.125, 0.5)
    assert "The federation sets learning_rate=0.125 (was 0.01)." in caplog.text


def test_a_hugging_face_dataset_with_more_columns(tmp_path):
    rows = [row | {"specialty": "x"} for row in make_tiny_data(7)]
    one, two = found(tmp_path / "one/box"), found(tmp_path / "two/box")
    run(tmp_path / "one", one, data=Dataset.from_list(rows), arguments={"remove_unused_columns": True})
    run(tmp_path / "two", two)
    assert snapshot(tmp_path / "one/box", one) == snapshot(tmp_path / "two/box", two)


def test_checkpoints_and_resuming_do_not_disturb_rounds(tmp_path):
    plain = found(tmp_path / "plain/box", rounds=2)
    run(tmp_path / "plain", plain)
    mailbox = found(tmp_path / "saved/box", rounds=2)
    thread = serve(mailbox)
    trainer = make_trainer(tmp_path / "saved", mailbox, arguments={"save_strategy": "steps", "save_steps": 1})
    trainer.train(resume_from_checkpoint=True)
    thread.join(30)
    assert (tmp_path / "saved/a/checkpoint-4/adapter_model.safetensors").is_file()
    assert snapshot(tmp_path / "saved/box", mailbox) == snapshot(tmp_path / "plain/box", plain)


def test_a_shard_smaller_than_a_batch(tmp_path):
    mailbox = found(tmp_path / "box")
    trainer = run(tmp_path, mailbox, data=make_tiny_data(1), arguments={"per_device_train_batch_size": 4})
    assert trainer.state.global_step == 4


# Refusals


def refused(tmp_path, mailbox, error, match, **options):
    """Training ends in this error, and nothing was sent or stored."""
    with pytest.raises(error, match=match):
        make_trainer(tmp_path, mailbox, **options).train()
    assert mailbox.list_updates(0) == []
    assert not (tmp_path / "a/fedfstq/session.safetensors").exists()


def test_a_model_without_lora(tmp_path):
    with pytest.raises(AdapterMismatchError, match="wrap the base first, for example"):
        make_trainer(tmp_path, model=make_tiny_model().unload())


def test_two_active_adapters(tmp_path):
    model = make_tiny_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(AdapterMismatchError, match="set_adapter"):
        make_trainer(tmp_path, model=model)


def test_another_base_model(tmp_path):
    mailbox = found(tmp_path / "box")
    match = r"its embeddings differ\. Load the base model 'org/tiny'"
    refused(tmp_path, mailbox, AdapterMismatchError, match, model=make_tiny_model(seed=5))


def test_another_rank(tmp_path):
    mailbox = found(tmp_path / "box")
    refused(
        tmp_path,
        mailbox,
        AdapterMismatchError,
        r"PeftModel\.from_pretrained\(base, mailbox\)",
        model=make_tiny_model(r=8),
    )


def test_other_target_modules(tmp_path):
    mailbox = found(tmp_path / "box")
    model = make_tiny_model(exclude_modules=["q_proj"])
    refused(tmp_path, mailbox, AdapterMismatchError, "Build it from the federation's adapter_config.json", model=model)


def test_an_empty_shard(tmp_path):
    mailbox = found(tmp_path / "box")
    refused(tmp_path, mailbox, DataError, "training data of client 'a' is empty: it cannot take part", data=[])


def test_a_stream(tmp_path):
    mailbox = found(tmp_path / "box")
    stream = Dataset.from_list(make_tiny_data(3)).to_iterable_dataset()
    refused(tmp_path, mailbox, DataError, "known length; materialise a streaming one first", data=stream)


def test_labels_that_are_all_masked(tmp_path):
    mailbox = found(tmp_path / "box")
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in make_tiny_data(3)]
    refused(
        tmp_path, mailbox, DataError, "All labels .* are masked .* Check that truncation keeps the answers", data=rows
    )


def test_a_loss_that_is_not_a_number(tmp_path):
    mailbox = found(tmp_path / "box")
    model = make_tiny_model()
    model.get_base_model().model.norm.weight.data.fill_(torch.nan)
    match = r"client 'a'.* round 0.*nothing of this round was sent.*Lower the learning rate or check the data"
    refused(tmp_path, mailbox, NonFiniteError, match, model=model)


def test_a_loss_that_diverges_in_a_later_round_loses_no_residual(tmp_path):
    mailbox = found(tmp_path / "box", codec="fstq", uplink_budget="1kB", rounds=3)
    thread = serve(mailbox)
    trainer = make_trainer(tmp_path, mailbox)

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.get_base_model().model.norm.weight.data.fill_(torch.nan)

    trainer.add_callback(Poison())
    with pytest.raises(NonFiniteError, match="round 1"):
        trainer.train()
    assert [ref.client_id for ref in mailbox.list_updates(0)] == ["a"]
    assert mailbox.list_updates(1) == []
    spec = FederationSpec.from_json(mailbox.read(0, "spec.json"))
    session = ClientSession("a", spec, trainer.adapter_view.schema, folder=tmp_path / "a/fedfstq")
    assert (session.last_round, session.pending) == (0, None)
    assert session.residual_norm() > 0
    session.close()
    run_on = make_trainer(tmp_path, mailbox)  # with a healthy model it goes on
    run_on.train()
    thread.join(30)
    assert mailbox.head() == 3


def test_a_budget_below_the_header_in_a_federation(tmp_path):
    mailbox = found(tmp_path / "box", codec="fstq")
    match = (
        r"An uplink budget of 60 bytes, \d+ of them for the message's header, is too small for client 'a': .*raise the"
    )
    refused(tmp_path, mailbox, BudgetError, match, uplink_budget=60)


def test_a_budget_that_is_too_small_is_refused_before_any_training(tmp_path):
    class Never(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            pytest.fail("it trained")

    trainer = make_trainer(tmp_path, found(tmp_path / "box"), uplink_budget=5000)
    trainer.add_callback(Never())
    with pytest.raises(BudgetError, match="5000 bytes") as caught:
        trainer.train()  # fp32 needs three times that
    assert caught.traceback  # which keeps the session alive, but not its folder locked
    with pytest.raises(BudgetError, match="5000 bytes"):
        trainer.train()


def test_no_federation_at_the_address(tmp_path):
    with pytest.raises(MailboxError, match=r"holds no federation\. Check the address, or make one with `fedfstq init"):
        make_trainer(tmp_path, FolderMailbox(tmp_path / "nowhere")).train()


def test_nobody_serves(tmp_path):
    mailbox = found(tmp_path / "box")
    trainer = make_trainer(tmp_path, mailbox, wait_seconds=0)
    with pytest.raises(
        MailboxError, match=r"Is `fedfstq serve .*` running\? Start this client again at any time: nothing is"
    ):
        trainer.train()
    thread = serve(mailbox)
    make_trainer(tmp_path, mailbox).train()  # the state folder was released
    thread.join(30)
    assert mailbox.head() == 2


def test_fp16_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.fp16 = True
    arguments = trainer.args
    with pytest.raises(ConfigError, match="Use bf16=True or float32"):
        FedFSTQTrainer(model=make_tiny_model(), args=arguments, train_dataset=make_tiny_data(2))

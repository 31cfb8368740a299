"""What FedFSTQTrainer refuses, with nothing sent and nothing lost."""

import pytest
import torch
from peft import LoraConfig
from tiny import make_tiny_data, make_tiny_model
from tiny_federation import found, make_trainer, serve
from transformers import TrainerCallback

from fedfstq_hf.adapter import base_fingerprint
from fedfstq_hf.errors import AdapterMismatchError, BudgetError, DataError, MailboxError, NonFiniteError
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.generation.saliency import tokenizer_fingerprint


def refused(tmp_path, mailbox, error, match, **options):
    """Training ends in this error, and nothing was sent or stored."""
    with pytest.raises(error, match=match):
        make_trainer(tmp_path, mailbox, **options).train()
    assert mailbox.list_updates(0) == []
    assert not (tmp_path / "a.fedfstq/session.safetensors").exists()


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


def test_labels_that_are_all_masked(tmp_path):
    mailbox = found(tmp_path / "box")
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in make_tiny_data(3)]
    refused(
        tmp_path, mailbox, DataError, "All labels .* are masked .* Check that truncation keeps the answers", data=rows
    )


def test_a_loss_that_is_not_a_number(tmp_path):
    mailbox = found(tmp_path / "box")
    trainer = make_trainer(tmp_path, mailbox)

    class Poison(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.get_base_model().model.norm.weight.data.fill_(torch.nan)

    trainer.add_callback(Poison())
    match = r"client 'a'.* round 0.*nothing of this round was sent.*Lower the learning rate or check the data"
    with pytest.raises(NonFiniteError, match=match):
        trainer.train()
    assert mailbox.list_updates(0) == []


def test_a_loss_that_diverges_in_a_later_round_loses_no_residual(tmp_path):
    mailbox = found(tmp_path / "box", codec="topk", uplink_budget="1kB", rounds=3)
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
    session = ClientSession("a", spec, trainer.adapter_view.schema, folder=tmp_path / "a.fedfstq")
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


def test_another_tokenizer(tmp_path):
    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: number for number, word in enumerate(self.words)}

    known = base_fingerprint(make_tiny_model()) | {"tokenizer": tokenizer_fingerprint(Words("a", "b"))}
    mailbox = found(tmp_path / "box", base_fingerprint=known)
    trainer = make_trainer(tmp_path, mailbox)
    trainer.processing_class = Words("b", "a")
    with pytest.raises(AdapterMismatchError, match="ids would stand for other tokens"):
        trainer.train()

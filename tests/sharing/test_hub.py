"""Publishing and loading through the real Hub client, against the loopback Hub."""

import logging

import pytest
import torch
from huggingface_hub import CommitOperationAdd
from peft import PeftModel

from fedfstq_hf import load_compressed_adapter, push_compressed_adapter
from fedfstq_hf.errors import MailboxError, MessageError
from fedfstq_hf.sharing.hub import open_repo, publish
from fedfstq_hf.sharing.packed import CARD_FILE, EXACT_FILE, FACTS_FILE, MESSAGE_FILE
from tests.sharing.conftest import fresh_base, logits, trained

REPO = "lab/small"


@pytest.fixture
def token(hub_here):
    return hub_here.user("ann", "write", org="lab")


def test_push_and_load(hub_here, token):
    model = trained(use_dora=True)
    made = push_compressed_adapter(model, REPO, 8000, token=token, private=True, include_plain=True)
    assert set(hub_here.files(REPO)) - {".gitattributes"} == set(made.all_files())
    assert hub_here.read(REPO, MESSAGE_FILE) == made.files[MESSAGE_FILE]
    before = len(hub_here.commits(REPO))
    loaded = load_compressed_adapter(fresh_base(), REPO, token=token)
    expected = logits(loaded)
    assert float((expected - logits(model)).norm() / logits(model).norm()) < 0.05
    plain = PeftModel.from_pretrained(fresh_base(), REPO, token=token)
    assert torch.equal(logits(plain), expected)
    # in one commit; again without the plain file, which goes, and with a file and a text of somebody else, which stay
    api = open_repo(REPO, token).api
    card = hub_here.read(REPO, CARD_FILE).decode()
    api.create_commit(
        REPO,
        [
            CommitOperationAdd("notes.txt", b"mine"),
            CommitOperationAdd(
                CARD_FILE, card.replace("<!-- fedfstq:begin", "My own words.\n\n<!-- fedfstq:begin").encode()
            ),
        ],
        commit_message="mine",
    )
    push_compressed_adapter(trained(), REPO, "12bpp", token=token)
    assert len(hub_here.commits(REPO)) == before + 2
    files = set(hub_here.files(REPO))
    assert "notes.txt" in files
    assert not {EXACT_FILE, "adapter_model.safetensors"} & files
    card = hub_here.read(REPO, CARD_FILE).decode()
    assert "My own words." in card
    assert EXACT_FILE not in card
    # an earlier version by its commit
    old = hub_here.commits(REPO)[2]["oid"]
    assert torch.equal(logits(load_compressed_adapter(fresh_base(), REPO, revision=old, token=token)), expected)


def test_a_lost_answer_makes_no_second_commit(hub_here, token, made):
    repo = open_repo(REPO, token, 30.0)
    publish(made, repo)
    count = len(hub_here.commits(REPO))
    publish(made, repo)
    assert len(hub_here.commits(REPO)) == count


def test_refusals_name_the_remedy_and_no_token(hub_here, made, caplog):
    caplog.set_level(logging.DEBUG)
    reader = hub_here.user("bob", "read", org="lab")
    with pytest.raises(MailboxError) as refused:
        publish(made, open_repo(REPO, reader, 1.0))
    assert reader not in str(refused.value)
    with pytest.raises(MailboxError) as unknown:
        load_compressed_adapter(fresh_base(), "lab/nowhere", token=reader, patience=1.0)
    assert reader not in str(unknown.value)
    with pytest.raises(MailboxError) as wrong:
        load_compressed_adapter(fresh_base(), REPO, token="hf_" + "x" * 34, patience=1.0)
    assert "hf_xxxx" not in str(wrong.value)
    assert reader not in caplog.text
    with pytest.raises(MailboxError, match="neither a folder here nor the id of a repo"):
        load_compressed_adapter(fresh_base(), "no such/folder/here")


def test_a_repo_that_holds_something_else(hub_here, token, made):
    api = open_repo(REPO, token).api
    api.create_repo(REPO)
    with pytest.raises(MessageError, match=f"has no {FACTS_FILE}.*PeftModel.from_pretrained"):
        load_compressed_adapter(fresh_base(), REPO, token=token)
    files = dict(made.files)
    del files[MESSAGE_FILE]
    api.create_commit(REPO, [CommitOperationAdd(n, d) for n, d in files.items()], commit_message="part")
    with pytest.raises(MessageError, match=f"has no {MESSAGE_FILE}"):
        load_compressed_adapter(fresh_base(), REPO, token=token)
    api.create_commit(REPO, [CommitOperationAdd(MESSAGE_FILE, bytes(10**6))], commit_message="huge")
    with pytest.raises(MessageError, match="has 1000000 bytes; at most"):
        load_compressed_adapter(fresh_base(), REPO, token=token)
    api.create_commit(REPO, [CommitOperationAdd(MESSAGE_FILE, made.files[MESSAGE_FILE][:-1])], commit_message="cut")
    with pytest.raises(MessageError, match=f"{MESSAGE_FILE} has sha256"):
        load_compressed_adapter(fresh_base(), REPO, token=token)

"""A client is told what it is asked, asked once, and refuses whatever the mailbox says otherwise from then on."""

import dataclasses
import io
import json

import pytest
import typer
from launcher import fails, wait_for
from light import found, make_spec
from tiny_workload import write_client_file

from fedfstq_hf.cli.participate import _ask
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation.client.agreement import AGREEMENT_FILE, agree, is_agreed, read_terms, summary
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.running.client_file import load_client_file
from fedfstq_hf.running.train import run_client

KEY = "x25519:" + "ab" * 32


def rewrite(box, **fields):
    """What a mailbox does that changes its mind."""
    path = box / "rounds/000000/spec.json"
    path.write_bytes(dataclasses.replace(FederationSpec.from_json(path.read_bytes()), **fields).to_json())


def terms_of(mailbox):
    return read_terms(mailbox, str(mailbox.path))


# What is said


def test_the_summary_says_what_a_client_does():
    spec = make_spec(
        model="org/base",
        local_steps=7,
        rounds=12,
        training={"optim": "sgd", "learning_rate": 0.25},
        client_defaults={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
        uplink_budget="96kB",
        objective="hard",
        data={"format": "fed_med", "max_length": 99},
    )
    said = "\n".join(summary(spec, "hf://org/run"))
    for part in (
        f"Federation 'light' at hf://org/run, id {spec.id}",
        "Base model: org/base",
        "up to 12 rounds of 7 steps with sgd at learning rate 0.25, objective hard",
        "batches of 8 and accumulation of 2",
        "cut to 99 tokens",
        "codec fp32, of 96kB each unless you set a budget; never more than 4096 bytes",
        "Readable by: whoever can read the mailbox",
        "Signatures: not required",
        "not asked for",
    ):
        assert part in said
    said = "\n".join(summary(make_spec(sealing_key=KEY, signatures=True, share_saliency=True), "fed"))
    for part in (
        f"holder of the key {KEY} only",
        "Signatures: required",
        "sent only if your settings say share_saliency",
    ):
        assert part in said


def test_what_a_mailbox_calls_itself_cannot_move_the_cursor():
    hostile = "\x1b[2J\x1b]0;owned\x07\u202e\nBase model: safe"
    lines = summary(make_spec(name=hostile, model=hostile, codec_options={}), hostile)
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if line.startswith("Base model")] == [lines[1]]


# What is kept


def test_what_was_agreed_to_is_kept_and_changes_are_named(tmp_path):
    mailbox, folder = found(tmp_path / "box"), tmp_path / "state"
    assert not is_agreed(folder, terms_of(mailbox))
    assert not folder.exists()
    agree(folder, terms_of(mailbox), durable=False)
    kept = (folder / AGREEMENT_FILE).read_bytes()
    assert is_agreed(folder, terms_of(mailbox))
    agree(folder, terms_of(mailbox), durable=False)
    assert (folder / AGREEMENT_FILE).read_bytes() == kept
    assert json.loads(kept)["address"] == str(mailbox.path)
    assert json.loads(kept)["federation"] == terms_of(mailbox).spec.id

    rewrite(mailbox.path, local_steps=99, name="\x1b[2J")
    for check in (is_agreed, agree):
        with pytest.raises(MailboxError, match=r"local_steps is 99, agreed was 1") as error:
            check(folder, terms_of(mailbox))
        assert "spec.json: name is '\\x1b[2J', agreed was 'light'" in str(error.value)
        assert "\x1b" not in str(error.value)
        assert f"type: rm {folder / AGREEMENT_FILE}" in str(error.value)
    assert (folder / AGREEMENT_FILE).read_bytes() == kept
    (folder / AGREEMENT_FILE).unlink()
    agree(folder, terms_of(mailbox), durable=False)
    assert is_agreed(folder, terms_of(mailbox))


def test_other_bytes_are_a_change_even_where_no_field_differs(tmp_path):
    mailbox = found(tmp_path / "box")
    agree(tmp_path / "state", terms_of(mailbox), durable=False)
    path = mailbox.path / "rounds/000000/spec.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(MailboxError, match=r"spec\.json is written in another way"):
        is_agreed(tmp_path / "state", terms_of(mailbox))


def test_another_adapter_config_is_a_change(tmp_path):
    mailbox = found(tmp_path / "box")
    agree(tmp_path / "state", terms_of(mailbox), durable=False)
    (mailbox.path / "rounds/000000/adapter_config.json").write_text('{"r": 100000}')
    with pytest.raises(MailboxError, match=r"adapter_config\.json: r is 100000, agreed was None"):
        is_agreed(tmp_path / "state", terms_of(mailbox))


def test_a_process_that_comes_second_agrees_to_the_same_or_not_at_all(tmp_path, monkeypatch):
    """Both find no agreement; the other one's is written in between."""
    mailbox, folder = found(tmp_path / "box"), tmp_path / "state"
    first = terms_of(mailbox)
    rewrite(mailbox.path, local_steps=99)
    second = terms_of(mailbox)
    from fedfstq_hf.federation import storage

    create = storage.create_file

    def late(path, data, *, durable=True):
        monkeypatch.setattr(storage, "create_file", create)
        agree(folder, first, durable=False)
        return create(path, data, durable=durable)

    monkeypatch.setattr(storage, "create_file", late)
    with pytest.raises(MailboxError, match="local_steps is 99, agreed was 1"):
        agree(folder, second, durable=False)
    assert is_agreed(folder, first)


def test_an_adapter_config_without_bounds_is_refused_unread(tmp_path):
    mailbox = found(tmp_path / "box")
    path = mailbox.path / "rounds/000000/adapter_config.json"
    for data, match in (
        (b"[" * 10_000, "cannot be read"),
        (b'{"a": "' + b"x" * 300_000 + b'"}', "expected at most"),
        (b"[]", "expected an object"),
        (b'{"r": NaN}', "NaN"),
    ):
        path.write_bytes(data)
        with pytest.raises(MailboxError, match=match):
            terms_of(mailbox)


# Who is asked


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("answer", "agrees"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_the_answer_counts(monkeypatch, capsys, answer, agrees):
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    if agrees:
        _ask(["what is asked"], yes=False)
    else:
        with pytest.raises(typer.Exit):
            _ask(["what is asked"], yes=False)
    assert capsys.readouterr().out.startswith("what is asked\nTake part? [y/N]: ")


def test_scripts_say_yes(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(ConfigError, match=r"no terminal to ask whether to take part.*type --yes"):
        _ask(["what is asked"], yes=False)
    _ask(["what is asked"], yes=True)
    assert capsys.readouterr().out == "what is asked\n" * 2


@pytest.fixture
def federation(launcher, tiny_recipe, tmp_path):
    box = tmp_path / "box"
    launcher.run("init", box, "--recipe", tiny_recipe, "--min-clients", "1", "--rounds", "2")
    return box, write_client_file(tiny_recipe.parent, box, "client-0000", tmp_path / "clients")


def test_a_client_is_asked_once_and_refuses_a_change(launcher, federation, tmp_path):
    box, file = federation
    state = tmp_path / "clients/client-0000.fedfstq"
    assert "type --yes" in fails(launcher, "train", file)
    assert not state.exists()
    assert not (box / "updates").exists()

    def send():
        sent.unlink(missing_ok=True)
        wait_for(lambda: sent.exists() or training.poll() is not None)
        training.kill()
        training.wait()
        assert sent.exists(), training.stderr

    sent = box / "updates/000000/client-0000.safetensors"
    training = launcher.start("train", "--yes", file)
    send()
    assert "Training: up to 2 rounds of 2 steps with adamw_torch at learning rate 0.01" in training.stdout
    assert (state / AGREEMENT_FILE).exists()
    training = launcher.start("train", file)  # nobody is asked again
    send()
    assert "Training:" not in training.stdout

    rewrite(box, local_steps=900_000)
    message = fails(launcher, "train", "--yes", file)
    assert "spec.json: local_steps is 900000, agreed was 2" in message


def test_a_spec_that_commands_the_machine_never_gets_as_far_as_a_question(federation):
    box, file = federation
    hostile = {"push_to_hub": True, "hub_model_id": "attacker/loot", "hub_token": "hf_x", "save_strategy": "steps"}
    path = box / "rounds/000000/spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"client_defaults": hostile}))
    with pytest.raises(MailboxError, match=r"client_defaults\.\w+ is each client's own decision"):
        run_client(load_client_file(file), consent=lambda lines: pytest.fail("asked"))


def test_a_mailbox_that_changes_between_two_looks_is_refused(federation, tmp_path):
    """The consent is to the first bytes; the Trainer, which joins by itself, finds others."""
    box, file = federation
    with pytest.raises(MailboxError, match=r"rounds is 77, agreed was 2"):
        run_client(load_client_file(file), consent=lambda lines: rewrite(box, rounds=77))
    assert not (box / "updates").exists()
    kept = json.loads((tmp_path / "clients/client-0000.fedfstq" / AGREEMENT_FILE).read_text())
    assert kept["spec"]["rounds"] == 2


def test_who_declines_leaves_nothing(federation, tmp_path):
    box, file = federation

    def decline(lines):
        assert any("2 rounds of 2 steps" in line for line in lines)
        raise typer.Exit(1)

    with pytest.raises(typer.Exit):
        run_client(load_client_file(file), consent=decline)
    assert not (tmp_path / "clients/client-0000").exists()
    assert not (box / "updates").exists()

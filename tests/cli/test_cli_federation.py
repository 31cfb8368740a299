"""The commands of a federation's life, one after the other as people type them: keys, control, evaluation, the end."""

import json
import time

import pytest
import yaml
from launcher import fails, wait_for
from tiny_workload import OWNERS, write_client_file

from fedfstq_hf.federation.history import load

CLIENTS = sorted(OWNERS)
FIRST, SECOND, _ = CLIENTS


@pytest.fixture
def found(launcher, tiny_recipe, tmp_path):
    """Founds a federation with these options; returns its folder and what was said."""

    def found(*options):
        box = tmp_path / "box"
        return box, launcher.run("init", box, "--recipe", tiny_recipe, *options).stdout

    return found


def client_file(tiny_recipe, box, tmp_path, owner=FIRST, **changes):
    file = write_client_file(tiny_recipe.parent, box, owner, tmp_path / "clients")
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
    return file


def spec(box):
    return json.loads((box / "rounds/000000/spec.json").read_text())


def record(box, round):
    return json.loads((box / f"rounds/{round:06d}/round.json").read_text())


def send(launcher, file, box, round=0, owner=FIRST):
    """Let a client train and send one message, and stop it."""
    training = launcher.start("train", "--yes", file)
    sent = box / f"updates/{round:06d}/{owner}.safetensors"
    wait_for(lambda: sent.exists() or training.poll() is not None)
    assert sent.exists(), training.stderr[-2000:]
    training.kill()
    training.wait()


# Founding


def test_what_init_says_stands_in_the_spec(found):
    box, said = found(
        *("--clients", ",".join(CLIENTS), "--clients-per-round", "2", "--round-seconds", "60"),
        *("--max-staleness", "2", "--clip", "4", "--signatures", "--base-model-name", "lab/base"),
    )
    assert "2 updates a round." in said
    assert f"Enrol each client's key: fedfstq enrol {box} {FIRST} --verify-key ed25519:..." in said
    config = json.loads((box / "rounds/000000/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "lab/base"
    expected = {
        "model": "lab/base",
        "clients_per_round": 2,
        "min_clients": 2,
        "round_seconds": 60.0,
        "signatures": True,
        "sealing_key": None,
    }
    assert {name: spec(box)[name] for name in expected} == expected
    assert (spec(box)["method"]["max_staleness"], spec(box)["method"]["clip"]) == (2, 4.0)
    assert sorted(json.loads((box / "control.json").read_text())["clients"]) == CLIENTS
    assert len(record(box, 0)["selected"]) == 2


def test_defaults_let_anybody_take_part(found):
    box, said = found()
    assert said.rstrip().endswith(f"Next: fedfstq serve {box}")
    method = spec(box)["method"]
    assert (method["clip"], method["max_staleness"], spec(box)["signatures"]) == (10.0, 0, False)
    assert not (box / "control.json").exists()
    assert (box / "README.md").read_text().startswith("---\n")
    assert load((box / "history.jsonl").read_bytes())[0].round == 0


def test_clipping_can_be_switched_off_and_min_clients_follows_the_list(found):
    box, _ = found("--clip", "0", "--clients", "a,b")
    assert (spec(box)["method"]["clip"], spec(box)["min_clients"]) == (None, 2)


# Control


def test_pause_resume_and_status(launcher, tiny_recipe, found, tmp_path):
    box, _ = found("--min-clients", "1")
    send(launcher, client_file(tiny_recipe, box, tmp_path), box)
    said = launcher.run("pause", box, "--reason", "the cluster moves").stdout
    assert said == f"Paused {box}: the cluster moves. Go on with: fedfstq resume {box}\n"
    assert "paused: the cluster moves" in launcher.run("status", box).stdout
    served = launcher.run("serve", box, "--once").stdout
    assert f"Paused: the cluster moves. Go on with: fedfstq resume {box}" in served
    assert not (box / "rounds/000001").exists()
    assert launcher.run("resume", box).stdout == f"{box} goes on.\n"
    assert "round 1/3: 1 updates" in launcher.run("serve", box, "--once").stdout


def test_enrol(launcher, tiny_recipe, found, tmp_path):
    box, _ = found("--clients", "x,y", "--min-clients", "1")
    file = client_file(tiny_recipe, box, tmp_path)
    message = fails(launcher, "train", "--yes", file)
    assert (
        f"Client '{FIRST}' is not enrolled in {box}. Check client_id, or ask for `fedfstq enrol {box} {FIRST}`."
        in message
    )
    said = launcher.run("enrol", box, FIRST, "--max-examples", "3").stdout
    assert said == f"Enrolled are now 3: {FIRST}, x, y. All others are refused.\n"
    send(launcher, file, box)
    assert f"here are 1: {FIRST}" in launcher.run("status", box).stdout
    assert launcher.run("enrol", box, "x", "y", "--remove").stdout.startswith(f"Enrolled are now 1: {FIRST}.")
    assert "'x' is not enrolled" in fails(launcher, "enrol", box, "x", "--remove")
    assert "leave --max-examples out" in fails(launcher, "enrol", box, FIRST, "--remove", "--max-examples", "3")
    assert "max_examples must be" in fails(launcher, "enrol", box, FIRST, "--max-examples", "0")
    assert "Expected a public key" in fails(launcher, "enrol", box, FIRST, "--verify-key", "abc")
    assert "--repo is one client's own; enrol a, b one by one." in fails(
        launcher, "enrol", box, "a", "b", "--repo", "o/r"
    )
    assert "cannot name a client" in fails(launcher, "enrol", box, "a/b")
    assert "0 clients would be left, but 1 updates close a round" in fails(launcher, "enrol", box, FIRST, "--remove")


def test_an_open_federation_stays_open_unless_that_is_said(launcher, found):
    box, _ = found("--min-clients", "1")
    assert "Type --close to let only a and those" in fails(launcher, "enrol", box, "a", "--max-examples", "3")
    assert "Enrolled are now 1: a." in launcher.run("enrol", box, "a", "--close").stdout
    assert launcher.run("reopen", box).stdout == f"{box} is open: anybody may send who can write there.\n"


def test_extend(launcher, found):
    box, _ = found("--clients", "a,b", "--min-clients", "1")
    said = launcher.run("extend", box, "--rounds", "9", "--min-clients", "2", "--round-seconds", "60").stdout
    assert f"{box}: 9 rounds in all, 2 updates close a round, a round closes after 60 s." in said
    assert "start them again" in said
    assert "9 rounds of" in launcher.run("status", box).stdout
    assert "Say what to change: --rounds 20" in fails(launcher, "extend", box)
    assert "rounds have no deadline" in launcher.run("extend", box, "--round-seconds", "0").stdout


def test_names_that_the_hub_does_not_take(launcher, tiny_recipe):
    said = fails(launcher, "init", "hf://lab/run", "--recipe", tiny_recipe, "--clients", "a--b,ok", "--patience", "0")
    assert "Client 'a--b' would have the Hub repo lab/run-a--b" in said


# Keys


def public_key(launcher, path, kind):
    return next(word for word in launcher.run("keys", "show", path).stdout.split() if word.startswith(kind))


def test_a_signed_and_sealed_federation(launcher, tiny_recipe, found, tmp_path):
    mine, boss, other = (tmp_path / name for name in ("mine.key", "boss.key", "other.key"))
    for path in (mine, boss, other):
        launcher.run("keys", "new", path)
    box, said = found("--clients", FIRST, "--signatures", "--seal-to", boss, "--rounds", "1")
    assert f"Next: fedfstq serve {box} --key KEYFILE" in said
    verify_key = public_key(launcher, mine, "ed25519:")
    settings = {"uplink_budget": 700, "signing_key": str(mine)}  # a signature and a seal take their bytes
    signed = client_file(tiny_recipe, box, tmp_path, **settings)
    message = fails(launcher, "train", "--yes", signed)
    assert f"enrolled with no verify key, but {mine} signs as {verify_key}." in message
    launcher.run("enrol", box, FIRST, "--verify-key", verify_key)
    message = fails(launcher, "train", "--yes", signed, "--signing_key", str(other))
    assert f"is enrolled with {verify_key}, but {other} signs as" in message
    plain = client_file(tiny_recipe, box, tmp_path)
    assert "takes signed messages only from client" in fails(launcher, "train", "--yes", plain)
    signed = client_file(tiny_recipe, box, tmp_path, **settings)
    send(launcher, signed, box)
    data = (box / f"updates/000000/{FIRST}.safetensors").read_bytes()
    assert data.startswith(b"fedfstq sealed\n")
    assert "Type --key KEYFILE" in fails(launcher, "serve", box, "--once")
    assert "Give the key file that the federation was founded with." in fails(launcher, "serve", box, "--key", other)
    served = launcher.run("serve", box, "--once", "--key", boss).stdout
    assert "round 1/1: 1 updates" in served
    (accepted,) = record(box, 1)["accepted"]
    assert (accepted["client_id"], accepted["signed"]) == (FIRST, True)
    assert "Round 0: update accepted" in launcher.run("train", "--yes", signed).stderr
    for path in box.rglob("*"):  # no private key has gone anywhere
        if path.is_file():
            assert boss.read_text().split("\n")[1].encode() not in path.read_bytes()


def test_a_key_where_none_is_needed(launcher, found, tmp_path):
    box, _ = found()
    launcher.run("keys", "new", tmp_path / "key")
    assert "are not sealed, nor its records signed: leave --key out." in fails(
        launcher, "serve", box, "--key", tmp_path / "key"
    )


def test_sealing_to_a_public_key(launcher, found, tmp_path):
    launcher.run("keys", "new", tmp_path / "key")
    key = public_key(launcher, tmp_path / "key", "x25519:")
    box, _ = found("--seal-to", key)
    assert spec(box)["sealing_key"] == key


# Evaluation


def test_evaluate_posts_what_status_and_card_show(launcher, tiny_recipe, found, tmp_path):
    box, _ = found("--min-clients", "1")
    rows = [json.loads(line) for line in (tiny_recipe.parent / "data.jsonl").read_text().splitlines()]
    held_out = tmp_path / "held out.jsonl"
    held_out.write_text(
        "".join(json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows[:7])
    )

    model = ("--model", tiny_recipe.parent / "model")
    said = launcher.run("evaluate", box, "--data", held_out, *model).stdout
    assert said.startswith("round 0, 7 examples of held-out: eval_loss ")
    posted = json.loads((box / "metrics/000000/held-out.json").read_text())
    assert set(posted) == {"eval_loss", "exact_match"}
    assert f"eval_loss {posted['eval_loss']:.4f}, exact_match {posted['exact_match']:.4f}" in said
    assert f"held-out eval_loss {posted['eval_loss']:.4f}" in launcher.run("status", box).stdout
    card = (box / "README.md").read_text()
    assert "held-out" in card
    assert "eval_loss" in card

    options = ("--data", tiny_recipe.parent / "data.jsonl", *model, "--source", "own-split", "--batch-size", "2")
    said = launcher.run("evaluate", box, *options).stdout
    assert said.startswith("round 0, 6 examples of own-split: ")  # the rows whose split is test


def test_evaluate_an_earlier_round_and_as_a_client(launcher, tiny_recipe, found, tmp_path):
    box, _ = found("--min-clients", "1")
    own = ("--data", tiny_recipe.parent / "data.jsonl", "--model", tiny_recipe.parent / "model")
    before = json.dumps(_metrics(launcher, box, "--source", "a", *own))
    send(launcher, client_file(tiny_recipe, box, tmp_path), box)
    launcher.run("serve", box, "--once")
    card = (box / "README.md").read_bytes()
    after = _metrics(launcher, box, "--source", "b", "--client-id", FIRST, *own, round=1)
    assert (box / "README.md").read_bytes() == card  # a client may not renew it
    assert json.dumps(_metrics(launcher, box, "--source", "c", "--round", "0", *own)) == before != json.dumps(after)


def _metrics(launcher, box, *options, round=0):
    launcher.run("evaluate", box, *options)
    return json.loads((box / f"metrics/{round:06d}/{options[1]}.json").read_text())


def test_what_cannot_be_evaluated(launcher, tiny_recipe, found, tmp_path):
    box, _ = found()
    assert "There is no round 1 yet: the newest is 0. Give a round from 0 to 0." in fails(
        launcher, "evaluate", box, "--round", "1"
    )
    assert "there is no file nowhere.jsonl" in fails(
        launcher, "evaluate", box, "--data", "nowhere.jsonl", "--model", tiny_recipe.parent / "model", cwd=tmp_path
    )
    assert "the evaluation names no data, and a mailbox cannot: type --data.path" in fails(launcher, "evaluate", box)
    data = ("--data", tiny_recipe.parent / "data.jsonl")
    assert "unknown key 'fromat' in the evaluation" in fails(launcher, "evaluate", box, *data, "--data.fromat", "x")
    assert "which is no Hub id. Name the base model yourself: type --model" in fails(launcher, "evaluate", box, *data)
    assert "cannot name a client or an evaluation set" in fails(launcher, "evaluate", box, "--source", "a b")
    assert "cannot be loaded" in fails(launcher, "evaluate", box, *data, "--model", "nowhere/at-all")
    train_only = tmp_path / "train.jsonl"
    train_only.write_text(json.dumps({"prompt": "w1", "answer": "w2", "split": "train"}) + "\n")
    model = ("--model", tiny_recipe.parent / "model")
    assert "no row whose split is test" in fails(launcher, "evaluate", box, "--data", train_only, *model)
    assert not (box / "metrics").exists()


# The end


def test_rollback_and_stop(launcher, tiny_recipe, found, tmp_path):
    box, _ = found("--min-clients", "1")
    file = client_file(tiny_recipe, box, tmp_path)
    send(launcher, file, box)
    launcher.run("serve", box, "--once")
    send(launcher, file, box, round=1)
    message = fails(launcher, "rollback", box, "1")
    assert "Cannot roll back to round 1: the newest is 1. Give a round from 0 to 0." in message
    said = launcher.run("rollback", box, "0").stdout
    assert "rolled back to round 0" in said
    assert f"refused {FIRST}: Rolled back to round 0." in said
    assert record(box, 2)["adapter_sha256"] == record(box, 0)["adapter_sha256"]
    assert "rolled back to round 0" in launcher.run("status", box).stdout
    said = launcher.run("stop", box).stdout
    assert f"Finished. Load it with: PeftModel.from_pretrained(base, {str(box)!r})" in said
    assert record(box, 3)["finished"] is True
    assert "is finished already; it cannot be stopped." in fails(launcher, "stop", box)
    assert "is finished already; it cannot be rolled back." in fails(launcher, "rollback", box, "0")
    assert "Round 1: update refused Rolled back to round 0." in launcher.run("train", "--yes", file).stderr
    assert launcher.run("serve", box).stdout.count("Finished.") == 1


def test_a_running_coordinator_learns_of_stop_and_rollback(launcher, tiny_recipe, found, tmp_path):
    box, _ = found("--min-clients", "1")
    send(launcher, client_file(tiny_recipe, box, tmp_path), box)
    serving = launcher.start("serve", box, "--poll-seconds", "0.05")
    wait_for(lambda: "round 1/3" in serving.stdout)
    launcher.run("rollback", box, "0")
    wait_for(lambda: "rolled back to round 0" in serving.stdout)
    launcher.run("stop", box)
    assert serving.wait() == 0
    assert "Finished." in serving.stdout
    time.sleep(0.01)
    assert "Traceback" not in serving.stderr


def test_the_card_keeps_what_people_wrote(launcher, tiny_recipe, found, tmp_path):
    box, _ = found("--min-clients", "1")
    card = box / "README.md"
    card.write_text(card.read_text() + "\n## Thanks\n\nTo the night shift.\n")
    send(launcher, client_file(tiny_recipe, box, tmp_path), box)
    launcher.run("serve", box, "--once")
    text = card.read_text()
    assert "To the night shift." in text
    assert "This is round 1 of 3" in text

"""A hostile spec: what it asks is bounded and of the right type, and nothing in it commands the client's machine."""

import json
import random

import pytest
import torch
from light import SCHEMA, make_spec

from fedfstq_hf.codec import codec_names
from fedfstq_hf.errors import ConfigError, FedFSTQError, MailboxError
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.spec import MAX_SPEC_BYTES, FederationSpec

HUGE = 10**9
NAN, INFINITE = float("nan"), float("inf")


def refused(match, **changes):
    """Neither made nor read."""
    with pytest.raises(ConfigError, match=match):
        make_spec(**changes)
    fields = json.loads(make_spec().to_json()) | changes
    data = json.dumps(fields, default=list).encode()
    with pytest.raises(MailboxError, match=r"The mailbox's spec|unknown"):
        FederationSpec.from_json(data)


@pytest.mark.parametrize(
    "name",
    [
        "push_to_hub",
        "hub_model_id",
        "hub_token",
        "hub_strategy",
        "output_dir",
        "logging_dir",
        "report_to",
        "resume_from_checkpoint",
        "dataloader_num_workers",
        "torch_compile",
        "deepspeed",
        "fsdp",
        "optim_target_modules",
        "save_strategy",
        "num_train_epochs",
        "remove_unused_columns",
        "__class__",
    ],
)
def test_client_defaults_are_batch_sizes_and_nothing_else(name):
    refused(f"client_defaults.{name} is each client's own decision", client_defaults={name: 1})


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", None, 4097, HUGE, [4]])
def test_batch_sizes_are_bounded_whole_numbers(name, value):
    refused(f"client_defaults.{name} must be", client_defaults={name: value})
    assert make_spec(client_defaults={name: 4096}).client_defaults[name] == 4096


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", 1e6),
        ("learning_rate", "1e-3"),
        ("learning_rate", True),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("adam_epsilon", 0),
        ("weight_decay", 1e30),
        ("max_grad_norm", -1.0),
        ("warmup_steps", 0.1),
        ("warmup_steps", HUGE),
        ("optim", "galore_adamw"),
        ("optim", "lomo"),
        ("optim", "adamw_anyprecision"),
        ("optim", "/tmp/plugin.py"),
        ("optim", ["sgd"]),
        ("lr_scheduler_type", "reduce_lr_on_plateau"),
        ("lr_scheduler_type", "some.module:schedule"),
        ("lr_scheduler_type", None),
        ("optim_args", "x=1"),
        ("hub_token", "hf_x"),
    ],
)
def test_shared_training_arguments_are_checked_by_value(name, value):
    refused(f"training.{name}", training={name: value})


def test_usual_training_arguments_pass():
    training = {"optim": "paged_adamw_8bit", "lr_scheduler_type": "cosine", "learning_rate": 2e-4, "adam_beta1": 0}
    assert make_spec(training=training).training == training


@pytest.mark.parametrize("value", [NAN, INFINITE])
@pytest.mark.parametrize("name", ["rho", "clip", "weight_cap", "round_seconds", "staleness_discount", "proximal_mu"])
def test_numbers_are_finite(name, value):
    refused(f"{name} must be (a number|one plain value)", **{name: value})
    refused("training.learning_rate", training={"learning_rate": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("rounds", "local_steps") for value in (10**6 + 1, True, 2.0, "3", None)),
        ("max_message_bytes", 2**32 + 1),
        ("min_clients", HUGE),
        ("refresh_steps", HUGE),
        ("max_staleness", HUGE),
        ("token_merge_layer", HUGE),
        ("num_clients", HUGE),
        ("clients_per_round", 1.0),
        ("preview_rounds", HUGE),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", "0"),
        ("rho", 1.0),
        ("rho", True),
        ("clip", "10"),
        ("error_feedback", True),
        ("freeze_a", 1),
        ("signatures", "yes"),
        ("share_saliency", None),
        ("name", "n" * 201),
        ("name", 3),
        ("model", "m" * 301),
        ("model", None),
        ("codec", ["fp32"]),
        ("objective", ["full"]),
        ("weights", {}),
        ("uplink_budget", "9" * 101),
        ("uplink_budget", True),
        ("uplink_budget", 1.5),
        ("uplink_budget", 0),
        ("refinement_budget", 2**33),
        ("sealing_key", 7),
        ("training", [["learning_rate", 1e-3]]),
        ("data", "jsonl"),
        ("server", {"lr": "x" * 201}),
        ("server", {f"option{number}": 1 for number in range(65)}),
        ("server", {"lr": {"deep": 1}}),
        ("base_fingerprint", {"embedding_probe": [0.0] * 65}),
        ("base_fingerprint", {"embedding_probe": ["x"]}),
        ("base_fingerprint", {"embedding_probe": [10**19]}),
        ("base_fingerprint", {"embedding_probe": 1.0}),
        ("base_fingerprint", {"model_type": "x" * 300}),
    ],
)
def test_types_and_sizes(name, value):
    refused(name.split("_bytes")[0], **{name: value})


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("nothing", {}),
        ("os.system", {}),
        ("fp32", {"path": "/etc/passwd"}),
        ("fp32", {"name": "fp16"}),
        ("fedpaq", {"levels": HUGE}),
        ("fstq", {"bits": 1e9}),
        ("fstq", {"bits": True}),
        ("fstq", {"fisher_weighted": 1}),
        ("paper", {"shares": "abc"}),
        ("paper", {"shares": 5}),
        ("paper", {"shares": [True, 0, 0]}),
        ("qsgd", {"bits": 64}),
        ("qsgd", {"bucket": 2**40}),
        ("sparseloco", {"top_k": HUGE}),
        ("topk", {"density": 1e9}),
        ("topk", {"value_bits": 32.0}),
        ("fstq", {"bits": -1.0}),
        ("fstq", {"seed": 1.5}),
    ],
)
def test_codecs_and_their_options_are_known_and_bounded(codec, options):
    refused("codec|option|expected", codec=codec, codec_options=options)


def test_the_largest_options_and_budgets_cost_a_client_nothing():
    """What each codec takes at most, with the largest budget there is, on an adapter of 192 coordinates."""
    largest = {
        "fstq": {"bits": 5e-324},
        "qsgd": {"bits": 8, "bucket": 2**32 - 1},
        "sparseloco": {"top_k": 1024},
        "topk": {"density": 5e-324},
    }
    for codec in codec_names():
        spec = make_spec(codec=codec, codec_options=largest.get(codec, {}))
        delta = torch.linspace(-1, 1, SCHEMA.num_params)
        for most in (None, 10**24):
            session = ClientSession("a", spec, SCHEMA)
            pending = session.finish(0, "0" * 64, delta, fisher=delta**2, num_examples=1, max_bytes=most)
            assert len(pending.message) < 4096, codec


def test_unknown_missing_and_oversized():
    fields = json.loads(make_spec().to_json())
    with pytest.raises(MailboxError, match=r"unknown field hub_token"):
        FederationSpec.from_json(json.dumps(fields | {"hub_token": "x"}).encode())
    with pytest.raises(MailboxError, match=r"unknown field \\x1b\[2J"):
        FederationSpec.from_json(json.dumps(fields | {"\x1b[2J": "x"}).encode())
    lacks = {name: value for name, value in fields.items() if name != "rounds"}
    with pytest.raises(MailboxError, match=r"it lacks rounds"):
        FederationSpec.from_json(json.dumps(lacks).encode())
    padded = make_spec().to_json() + b" " * MAX_SPEC_BYTES
    with pytest.raises(MailboxError, match="expected at most 65536"):
        FederationSpec.from_json(padded)
    with pytest.raises(MailboxError, match="nested deeper"):
        FederationSpec.from_json(json.dumps(fields).encode()[:-1] + b', "deep": ' + b"[" * 900 + b"]" * 900 + b"}")


def test_the_version_to_install_is_a_version():
    fields = json.loads(make_spec().to_json()) | {"format": 99, "package_version": "1 evil-package"}
    with pytest.raises(MailboxError) as error:
        FederationSpec.from_json(json.dumps(fields).encode())
    assert "evil-package" not in str(error.value)


def test_anything_else_than_a_spec_is_one_kind_of_error():
    """A few thousand specs with one value replaced: read, or refused as the mailbox's fault."""
    draw = random.Random(0)
    fields = json.loads(make_spec(server={"optimizer": "Adam", "lr": 0.1}, training={"optim": "sgd"}).to_json())
    odd = [
        None,
        True,
        0,
        -1,
        1.5,
        10**18,
        -1e300,
        "",
        "x" * 5000,
        "\ud800\u202e\x00",
        [],
        [[]],
        {},
        {"a": {"b": 1}},
        [1],
    ]
    odd += [{"": 1}, {"name": "x"}, {"self": 1}, {"embedding_probe": [True]}, ["a"] * 100, {"lr": [1, [2]]}]
    refusals = []
    for _ in range(4000):
        changed = fields | {draw.choice(list(fields)): draw.choice(odd)}
        try:
            FederationSpec.from_json(json.dumps(changed).encode())
        except FedFSTQError as error:
            refusals.append(error)
    assert len(refusals) > 2500
    for refusal in refusals:
        assert isinstance(refusal, MailboxError)
        assert len(str(refusal)) < 1200
        assert str(refusal).isprintable()

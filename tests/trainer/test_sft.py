"""FedFSTQSFTTrainer: TRL's data formats and loss inside a federation, and what a machine without TRL is told."""

import importlib
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from small_federation import Gradients, found, served, settings_of, snapshot
from tiny_workload import WORDS, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.codec import message

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'fedfstq_hf[trl]'")

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' </s> ' }}"
    "{% endgeneration %}{% else %}{{ 'w39 ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "model"
    make_model(folder)
    return folder


def texts(number):
    """A prompt of 2 to 5 words and an answer of 1 to 4: weights that a mean of means would get wrong."""
    words = [WORDS[(7 * number + step) % 39] for step in range(9)]
    return " ".join(words[: 2 + number % 4]), " ".join(words[5 : 6 + number % 4])


def prompts(num=8):
    return Dataset.from_list([dict(zip(("prompt", "completion"), texts(number), strict=True)) for number in range(num)])


def dialogues(num=8):
    rows = []
    for number in range(num):
        user, answer = texts(number)
        rows.append({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]})
    return Dataset.from_list(rows)


KINDS = {
    "prompts": (prompts, {"max_length": 16}),
    "packed": (prompts, {"packing": True, "max_length": 16, "per_device_train_batch_size": 3}),  # 8 examples in 3 rows
    "assistant-only": (dialogues, {"assistant_only_loss": True, "max_length": 16}),
}


def make_trainer(base, folder, *, cls=None, data=None, **arguments):
    from fedfstq_hf import FedFSTQSFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    config = trl.SFTConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            **arguments,
        }
    )
    cls = cls or FedFSTQSFTTrainer
    extra = {} if cls is trl.SFTTrainer else {"federation": settings_of(None)}
    return cls(model=model, args=config, train_dataset=data or prompts(), processing_class=tokenizer, **extra)


@pytest.mark.parametrize("kind", KINDS)
def test_one_round_of_one_client_is_plain_sft(base, tmp_path, kind):
    """Whole batches, so that the order of examples does not matter: the published adapter is SFTTrainer's."""
    make, options = KINDS[kind]
    plain = make_trainer(base, tmp_path / "plain", cls=trl.SFTTrainer, data=make(), **options)
    start = AdapterView(plain.model).read()
    assert len(plain.train_dataset) == plain.args.per_device_train_batch_size
    plain.train()
    expected = AdapterView(plain.model).read()
    client = make_trainer(base, tmp_path / "a", data=make(), **options)
    mailbox = found(tmp_path / "box", client.model, rounds=1, local_steps=4, training={"learning_rate": 1e-2})
    client.federation = settings_of(mailbox)
    with served(mailbox):
        client.train()
    assert [settlement.outcome for settlement in client.settlements] == ["accepted"]
    learned = client.adapter_view.read()
    assert float((learned - expected).abs().max()) <= 1e-4 * float((expected - start).abs().max())
    rows = [row for row in client.state.log_history if "loss" in row]
    assert len(rows) == 4
    assert all({"mean_token_accuracy", "entropy"} <= set(row) for row in rows)
    assert rows[-1]["fed_round"] == 0
    assert rows[-1]["loss"] < rows[0]["loss"]
    (ref,) = mailbox.list_updates(0)
    header, _ = message.unpack(mailbox.read_update(ref, max_bytes=10**9))
    assert header.num_examples == 8  # also where they are packed into fewer rows


@pytest.mark.parametrize("kind", KINDS)
def test_local_training_is_that_of_sft_trainer(base, tmp_path, kind):
    make, options = KINDS[kind]
    options = {**options, "per_device_train_batch_size": 2}
    adapters = []
    for cls in (None, trl.SFTTrainer):
        trainer = make_trainer(base, tmp_path, cls=cls, data=make(), **options)
        trainer.train()
        adapters.append(AdapterView(trainer.model).read())
    assert torch.equal(*adapters)


@pytest.mark.parametrize("objective", ["full", "unbiased"])
def test_accumulated_gradients_are_those_of_one_large_batch(base, tmp_path, objective):
    """Of a refresh step and one that is none, in double precision, without moving in between."""

    def train(size, steps):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer = make_trainer(base, tmp_path, data=prompts(16), learning_rate=0.0, **arguments)
        trainer._open_steps(settings_of(None, objective=objective))
        trainer.model.double()
        trainer.args.max_grad_norm = 0.0
        trainer.args.train_sampling_strategy = "sequential"
        watch = Gradients(trainer.adapter_view)
        trainer.add_callback(watch)
        trainer.train()
        return watch.seen, trainer.adapter_fisher.vector().double()

    reference, fisher = train(16, 1)
    assert float(reference[0].abs().max()) > 1e-3
    assert torch.equal(*reference) == (objective == "full")
    other, other_fisher = train(4, 4)
    for a, b in zip(reference, other, strict=True):
        assert float((a - b).abs().max()) <= 1e-6 * float(a.abs().max())
    assert float((other_fisher - fisher).abs().max()) <= 3e-6 * float(fisher.abs().max())


def test_resuming_within_a_round_is_the_uninterrupted_run(base, tmp_path):
    """With packing and an objective that draws; `test_checkpoint` has the rest."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    def client(folder, mailbox):
        make, options = KINDS["packed"]
        trainer = make_trainer(base, folder / "a", data=make(), save_strategy="steps", save_steps=1, **options)
        if mailbox is None:
            mailbox = found(folder / "box", trainer.model, rounds=2, objective="unbiased", refresh_steps=2)
        trainer.federation = settings_of(mailbox)
        return trainer, mailbox

    straight, one = client(tmp_path / "straight", None)
    with served(one):
        straight.train()
    killed, two = client(tmp_path / "killed", None)
    killed.add_callback(Stop())
    with served(two):
        with pytest.raises(KeyboardInterrupt):
            killed.train()
        resumed, _ = client(tmp_path / "killed", two)
        resumed.train(resume_from_checkpoint=True)
    assert snapshot(one) == snapshot(two)
    assert torch.equal(straight.sensitivity.scores(), resumed.sensitivity.scores())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_token_sensitivity_is_the_gradient_at_the_embeddings(base, tmp_path, checkpointing):
    """Against one plain forward and backward pass over the prepared rows, padded by hand."""
    trainer = make_trainer(base, tmp_path, max_steps=1, gradient_checkpointing=checkpointing)
    rows = [trainer.train_dataset[number] for number in range(8)]
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    assert all("labels" in row for row in rows)
    labels = torch.tensor([row["labels"] + [-100] * (length - len(row["labels"])) for row in rows])
    model = make_trainer(base, tmp_path, cls=trl.SFTTrainer).model.train()
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, attention_mask=mask).logits
    logits, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").backward()
    squared = embeddings.grad.square().sum(dim=-1)
    trainer.train()
    scores = trainer.sensitivity.scores()
    assert int(torch.isfinite(scores).sum()) > 10
    for token in range(len(scores)):
        places = (ids == token) & mask.bool()
        if places.any():
            assert scores[token].item() == pytest.approx(float(squared[places].mean()), rel=1e-4)
        else:
            assert scores[token].item() == torch.inf


def test_without_trl_it_says_what_to_type(monkeypatch):
    for name in [name for name in sys.modules if name == "fedfstq_hf.trainer.sft" or name.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"Type: pip install 'fedfstq_hf\[trl\]'"):
        importlib.import_module("fedfstq_hf.trainer.sft")


def test_the_package_does_not_import_trl():
    code = "import sys, fedfstq_hf; fedfstq_hf.FedFSTQConfig; sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

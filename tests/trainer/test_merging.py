"""Fed-ToMe: matching and merging by hand, and what a training step makes of it."""

import pytest
import torch
from local_training import Listed, Padded, make_trainer
from tiny import make_tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.recipe.sections import MethodSettings
from fedfstq_hf.trainer.methods.fedtome import FedToMe, match, merge, mergeable_tokens, rectangular

# Cosines of these keys are those of their angles, in degrees.
ANGLES = torch.tensor([[0.0, 90.0, 5.0, 100.0, 98.0, 4.0, 180.0, 181.0]])
KEYS = torch.stack([ANGLES.deg2rad().cos(), ANGLES.deg2rad().sin()], dim=-1) * torch.tensor([1.0, 7.0] * 4)[:, None]


def test_labels_what_predicts_them_the_first_token_and_padding_are_not_merged():
    labels = torch.tensor([[-100, -100, -100, -100, 7, 8, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    assert mergeable_tokens(labels, mask).tolist() == [[False, True, True, False, False, False, True, False]]
    left = mergeable_tokens(torch.full((1, 4), -100), torch.tensor([[0, 0, 1, 1]]))
    assert left.tolist() == [[False, False, False, True]]


def test_matching_by_hand():
    """Candidates are 0, 2, 4, 6; partners 1, 3, 5, 7, later ones only. 2-5 are 1 degree apart, 6-7 too, 0-5 are 4."""
    everything = torch.ones(1, 8, dtype=torch.bool)
    merged, partner = match(KEYS, everything, 0.375)
    assert merged.nonzero()[:, 1].tolist() == [0, 2, 6]
    assert partner[0, [0, 2, 6]].tolist() == [5, 5, 7]
    # 4 is 2 degrees from 3, which comes before it; with half of all it goes to what is left behind it
    merged, partner = match(KEYS, everything, 0.5)
    assert merged.nonzero()[:, 1].tolist() == [0, 2, 4, 6]
    assert partner[0, 4].item() == 7
    assert match(KEYS, everything, 0.124)[0].sum() == 0


def test_only_mergeable_tokens_match():
    allowed = torch.tensor([[False, True, True, True, False, False, False, True]])
    merged, partner = match(KEYS, allowed, 0.5)  # candidates 1 and 3, partners 2 and 7
    assert merged.nonzero()[:, 1].tolist() == [1, 3]
    assert partner[0, [1, 3]].tolist() == [2, 7]


def test_merging_by_hand():
    hidden = torch.tensor([[[1.0, 0.0], [2.0, 2.0], [3.0, 4.0], [10.0, 10.0]]])
    merged = torch.tensor([[True, False, True, False]])
    states, sizes = merge(hidden, merged, torch.tensor([[1, 0, 1, 0]]))
    assert sizes.tolist() == [[1.0, 3.0, 1.0, 1.0]]
    assert states[0, 1].tolist() == [2.0, 2.0]
    assert states[0, 3].tolist() == [10.0, 10.0]


def test_rows_keep_equally_many():
    """Padding goes first; a row that is long and merges little keeps the others from merging more."""
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    merged = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    merged, kept = rectangular(merged, real)
    assert merged.int().tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert kept.tolist() == [[0, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 2, 3, 4, 5]]
    _, kept = rectangular(torch.tensor([[0, 1, 0, 0, 0, 0]]).bool(), real[1:2])
    assert kept.tolist() == [[0, 2, 3]]


def batch_of(rows=3, length=14, prompt=10):
    ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def padded_batch():
    rows = [
        {"input_ids": row[: 14 - i], "labels": ([-100] * 10 + row[10:])[: 14 - i]}
        for i, row in enumerate(batch_of()["input_ids"].tolist())
    ]
    return Padded()(rows)


def test_the_loss_is_that_of_the_shorter_sequence():
    """Two equal neighbours are one token of size two: where nothing but their number counts, nothing changes."""
    model = make_tiny_model().eval()
    first, second = model.get_base_model().model.layers
    first.self_attn.o_proj.base_layer.weight.data.zero_()  # so that equal tokens reach the second block equal
    second.self_attn.q_proj.base_layer.weight.data.zero_()  # which attends to all alike, whatever their positions
    ids = torch.tensor([[1, 5, 5, 9, 9, 3, 17, 18]])
    labels = torch.tensor([[-100] * 6 + [17, 18]])
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    whole = model(**inputs)
    with FedToMe(model, 0.5, 1).merging(inputs):
        short = model(**inputs)
    assert short.logits.shape == whole.logits.shape
    assert torch.allclose(short.logits[0, 5:], whole.logits[0, 5:], atol=1e-5)
    assert short.loss.item() == pytest.approx(whole.loss.item(), abs=1e-6)
    assert not short.logits[0, 1].any()  # merged into 2: a zero state, whose logits are zero


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("inputs", [batch_of(), padded_batch()], ids=["full", "padded"])
def test_both_attentions_agree_and_the_model_is_left_as_it_was(inputs, implementation):
    model = make_tiny_model().eval()
    model.get_base_model().set_attn_implementation(implementation)
    before = model(**inputs).loss
    with FedToMe(model, 0.4, 1).merging(inputs):
        merged = model(**inputs).loss
    assert model(**inputs).loss == before
    reference = make_tiny_model().eval()
    with FedToMe(reference, 0.4, 1).merging(inputs):
        assert merged.item() == pytest.approx(reference(**inputs).loss.item(), abs=1e-5)
    assert merged.item() != before.item()


def test_no_position_sees_what_comes_after_it():
    """Changing the last prompt token changes nothing before it, even where it takes in an earlier one."""
    model = make_tiny_model().eval()
    inputs = batch_of(1)
    changed = {**inputs, "labels": inputs["labels"].clone(), "input_ids": inputs["input_ids"].clone()}
    inputs["labels"][0, 4] = changed["labels"][0, 4] = inputs["input_ids"][0, 4]  # a label in the middle
    changed["input_ids"][0, 9] = 1 + changed["input_ids"][0, 9] % 63
    logits = []
    for given in (inputs, changed):
        with FedToMe(model, 0.5, 1).merging(given):
            logits.append(model(**given).logits[0, 3:5])
    assert torch.allclose(logits[0], logits[1], atol=1e-5)


def test_later_blocks_see_fewer_tokens():
    model = make_tiny_model().eval()
    widths = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    inputs = batch_of()
    with FedToMe(model, 0.5, 1).merging(inputs):
        model(**inputs)
    assert widths == [14, 10]  # 8 of 10 prompt tokens can be merged: not the first, not the one that predicts a label


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = make_tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        inputs = batch_of()
        with FedToMe(model, 0.5, 1).merging(inputs):
            model(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def train(tmp_path, ratio, arguments=None, **spec):
    model = make_tiny_model()
    settings = {"token_merge_ratio": ratio, "training": {"optim": "sgd", "learning_rate": 0.05}}
    participation = Listed(model, 1, **(settings | spec))
    data = [{"input_ids": row, "labels": [-100] * 10 + row[10:]} for row in batch_of(16)["input_ids"].tolist()]
    trainer, watch = make_trainer(tmp_path, model=model, data=data, arguments=arguments)
    trainer.take_part(participation, participation.spec)
    return participation, trainer, watch


def test_training_merges_and_evaluation_does_not(tmp_path):
    plain, *_ = train(tmp_path, 0.0)
    merged, trainer, _ = train(tmp_path, 0.5)
    assert not torch.equal(plain.results[0].adapter, merged.results[0].adapter)
    loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer._steps.methods = []
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == loss


def test_it_is_the_same_however_a_batch_is_cut(tmp_path):
    _, _, whole = train(tmp_path, 0.5, {"per_device_train_batch_size": 4})
    _, _, cut = train(tmp_path, 0.5, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    for one, other in zip(whole.gradients, cut.gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_with_a_token_filter(tmp_path):
    participation, _, watch = train(tmp_path, 0.5, objective="unbiased", refresh_steps=2)
    assert len(watch.gradients) == 3
    assert all(bool(gradient.any()) for gradient in watch.gradients)
    assert participation.results[0].loss > 0


def test_refusals():
    with pytest.raises(ConfigError, match=r"token_merge_ratio must be a number of at least 0 and at most 0\.5"):
        MethodSettings(token_merge_ratio=0.6)
    with pytest.raises(ConfigError, match="token_merge_layer must be a whole number of at least 0"):
        MethodSettings(token_merge_layer=-1)
    with pytest.raises(ConfigError, match=r"layer is 9; this model has blocks 0 \.\. 1"):
        FedToMe(make_tiny_model(), 0.5, 9)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with pytest.raises(ConfigError, match="GPT2LMHeadModel gives its result the shape of its input"):
        FedToMe(gpt2, 0.5, 1)
    model = make_tiny_model()
    with pytest.raises(DataError, match="needs input_ids and labels"), FedToMe(model, 0.5, 1).merging({}):
        pass

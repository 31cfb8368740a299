"""The published saliency: packing, size, hostile files, aggregation, and loading it beside an adapter."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from families import make_ids
from safetensors.torch import save

from fedfstq_hf.demo import load_model, load_tokenizer, model_path
from fedfstq_hf.errors import AdapterMismatchError, ConfigError, DataError, MessageError
from fedfstq_hf.generation import published
from fedfstq_hf.generation.probe import Probe
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.saliency import FILE_NAME, Saliency, aggregate, pack, tokenizer_fingerprint, unpack
from fedfstq_hf.generation.scorers import Combined, QueryAttention
from fedfstq_hf.sensitivity import TokenSensitivity


def make_table(scores: list[float], levels: list[int], **fields) -> Saliency:
    return Saliency(
        torch.tensor(scores), torch.tensor(levels, dtype=torch.uint8), fields.pop("tokenizer", "t"), **fields
    )


def big(vocab_size: int = 32768, hidden_size: int = 4096) -> Saliency:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 4, (vocab_size,), generator=generator).to(torch.uint8)
    probe = Probe(torch.randn(hidden_size, generator=generator), 0.25, layer=2)
    base = {"model_type": "llama", "embedding_probe": [0.123456] * 16}
    return Saliency(torch.randn(vocab_size, generator=generator) * 4 - 20, levels, "f" * 64, base, probe)


def test_file_is_small_stable_and_close():
    table = big()
    data = pack(table)
    assert len(data) <= 64_000
    assert pack(table) == data
    back = unpack(data)
    seen = table.levels > 0
    spread = float(table.log_scores[seen].max() - table.log_scores[seen].min())
    assert (back.log_scores - table.log_scores)[seen].abs().max() <= spread / 510 + 1e-5
    assert torch.equal(back.levels, table.levels)
    assert torch.isinf(back.scores()[~seen]).all()
    assert (back.tokenizer, back.base, back.probe.layer, back.probe.bias) == ("f" * 64, table.base, 2, 0.25)
    torch.testing.assert_close(back.probe.weight, table.probe.weight, rtol=1e-3, atol=1e-3)
    assert pack(back) == data


@pytest.mark.parametrize(("scores", "levels"), [([1.0], [1]), ([0.0] * 5, [0] * 5), ([3.0, 3.0], [2, 1])])
def test_small_and_degenerate_tables(scores, levels):
    table = make_table(scores, levels)
    back = unpack(pack(table))
    assert torch.equal(back.scores(), table.scores())
    assert back.probe is None


def tampered(**changes):
    table = make_table([1.0, 2.0, 3.0], [1, 2, 3])
    fields = {"base": {}, "format": 1, "high": 3.0, "low": 1.0, "tokenizer": "t", "vocab_size": 3}
    tensors = {"levels": torch.zeros(1, dtype=torch.uint8), "scores": torch.zeros(3, dtype=torch.uint8)}
    assert unpack(pack(table)).vocab_size == 3
    for name, value in changes.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is None:
            fields.pop(name, None)
            tensors.pop(name, None)
        else:
            fields[name] = value
    return save(tensors, metadata={"saliency": json.dumps(fields)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 100,
        pack(make_table([1.0, 2.0], [1, 1]))[:-1],
        save({"scores": torch.zeros(3, dtype=torch.uint8)}),
        tampered(format=2),
        tampered(vocab_size=4),
        tampered(vocab_size=-1),
        tampered(vocab_size=10**30),
        tampered(low=float("nan")),
        tampered(low=5.0),
        tampered(high=None),
        tampered(base=3),
        tampered(levels=None),
        tampered(scores=torch.zeros(3)),
        tampered(extra=torch.zeros(3)),
        tampered(probe=torch.full((4,), torch.inf).half()),
        tampered(probe=torch.zeros(4)),
        tampered(probe=torch.zeros(4).half(), probe_layer=-1),
        tampered(probe=torch.zeros(4).half(), probe_bias=float("inf")),
    ],
)
def test_hostile_files_are_refused(data):
    with pytest.raises(MessageError, match=r"saliency\.safetensors"):
        unpack(data)


def test_from_sensitivity_keeps_levels_only():
    table = TokenSensitivity(6)
    table.update(torch.tensor([[0, 1, 2]]), torch.tensor([[4.0, 1.0, 0.0]]))
    for _ in range(4):
        table.update(torch.tensor([[3]]), torch.tensor([[2.0]]))
    for _ in range(40):
        table.update(torch.tensor([[4]]), torch.tensor([[2.0]]))
    saliency = Saliency.from_sensitivity(table, "t")
    assert saliency.levels.tolist() == [1, 1, 1, 2, 3, 0]
    torch.testing.assert_close(saliency.scores(), torch.tensor([2.0, 0.0, 0.0, 1.0, 1.0, torch.inf]))
    with pytest.raises(DataError, match="no token yet"):
        Saliency.from_sensitivity(TokenSensitivity(3), "t")


def test_aggregate_by_hand():
    one = make_table([1.0, 3.0, 0.0], [1, 1, 0])  # centred: -1, 1
    two = make_table([10.0, 0.0, 14.0], [1, 0, 1])  # centred: -2, 2
    both = aggregate([one, two], [1.0, 3.0])
    torch.testing.assert_close(both.log_scores, torch.tensor([(-1.0 + 3 * -2.0) / 4, 1.0, 2.0]))
    assert both.levels.tolist() == [2, 1, 1]
    shared = aggregate([one, two], [1.0, 3.0], min_clients=2)
    assert shared.levels.tolist() == [2, 0, 0]
    assert shared.scores()[1:].isinf().all()
    assert torch.equal(aggregate([one, two], [2.0, 6.0]).log_scores, both.log_scores)


def test_scale_of_a_clients_gradients_does_not_matter():
    one, two = make_table([1.0, 3.0], [2, 2]), make_table([4.0, 5.0], [2, 1])
    louder = make_table([24.0, 25.0], [2, 1])
    torch.testing.assert_close(aggregate([one, two], [1, 1]).scores(), aggregate([one, louder], [1, 1]).scores())


def test_probes_are_averaged_if_all_have_one():
    def table(probe):
        return make_table([1.0], [1], probe=probe)

    mean = aggregate([table(Probe(torch.zeros(2), 1.0, 2)), table(Probe(torch.ones(2), 5.0, 2))], [3.0, 1.0]).probe
    assert mean.weight.tolist() == [0.25, 0.25]
    assert (mean.bias, mean.layer) == (2.0, 2)
    assert aggregate([table(Probe(torch.zeros(2))), table(None)], [1, 1]).probe is None
    assert (
        aggregate([table(Probe(torch.zeros(2), layer=1)), table(Probe(torch.zeros(2), layer=2))], [1, 1]).probe is None
    )


def test_aggregate_refuses_tables_that_do_not_belong_together():
    one = make_table([1.0], [1])
    for other in (
        make_table([1.0], [1], tokenizer="u"),
        make_table([1.0, 1.0], [1, 1]),
        make_table([1.0], [1], base={"a": 1}),
    ):
        with pytest.raises(AdapterMismatchError, match="table 1"):
            aggregate([one, other], [1, 1])
    for tables, weights in (([], []), ([one], [0.0]), ([one], [1, 2])):
        with pytest.raises(ConfigError):
            aggregate(tables, weights)


def test_tables_are_checked():
    for scores, levels in (([1.0], [4]), ([torch.nan], [1]), ([1.0, 2.0], [1])):
        with pytest.raises(DataError):
            make_table(scores, levels)


@pytest.fixture
def adapter_repo(tmp_path):
    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    scores = torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(1))
    base = {"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 3}
    table = Saliency(scores, torch.ones(len(tokenizer), dtype=torch.uint8), tokenizer_fingerprint(tokenizer), base)
    (tmp_path / FILE_NAME).write_bytes(pack(table))
    return tmp_path


def test_from_pretrained_reads_the_table(adapter_repo):
    model = load_model()
    reducer = TokenReducer.from_pretrained(str(adapter_repo), keep_ratio=0.5, model=model)
    assert isinstance(reducer.scorer, Combined)
    ids = make_ids(1, 150)
    assert reducer.reduce(ids)["input_ids"].shape == (1, 75)
    assert model.generate(ids, max_new_tokens=2, custom_generate=reducer).shape == (1, 152)
    own = TokenReducer.from_pretrained(str(adapter_repo), scorer=QueryAttention(layer=1))
    assert own.scorer.layer == 1


def test_without_a_table_it_says_so_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(published, "_told", set())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model_path())}))
    with caplog.at_level(logging.WARNING):
        reducers = [TokenReducer.from_pretrained(str(tmp_path)) for _ in range(2)]
    assert [type(reducer.scorer) for reducer in reducers] == [QueryAttention] * 2
    assert reducers[0].tokenizer is not None
    assert [record.getMessage().count("query-aware scorer alone") for record in caplog.records] == [1]


def test_table_of_another_tokenizer_or_base(adapter_repo):
    other = load_tokenizer()
    other.add_tokens(["xyzzy"])
    with pytest.raises(AdapterMismatchError, match="for tokenizer"):
        TokenReducer.from_pretrained(str(adapter_repo), tokenizer=other)
    model = load_model()
    model.config.num_hidden_layers = 5
    with pytest.raises(AdapterMismatchError, match="belongs to a base"):
        TokenReducer.from_pretrained(str(adapter_repo), model=model)
    (adapter_repo / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="pass the tokenizer"):
        TokenReducer.from_pretrained(str(adapter_repo))

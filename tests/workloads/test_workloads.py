import json
import pickle
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.workloads import Collator, DataConfig, collate, load_texts, load_workload
from fedfstq_hf.workloads import rows as rows_module
from fedfstq_hf.workloads.examples import fit
from fedfstq_hf.workloads.load import cluster_topics

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "yes", "no", "Question", "Answer", ":", "#", "Instruction", "Input", "Response"]


def _tokenizer(*, ends: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: `<s>` in front, and with `ends` a `</s>` behind, as T5 and some Llamas do."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return _tokenizer()


def _write(folder: Path, rows: list) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _config(folder: Path, rows: list, **settings) -> DataConfig:
    return DataConfig(path=_write(folder, rows), **{"format": "jsonl", **settings})


PAIR = [
    {"prompt": "a b c", "answer": "yes", "split": "train", "topic": "x"},
    {"prompt": "d e", "answer": "no no", "split": "test", "topic": "y"},
]


# Tokens and labels


def test_labels_cover_the_answer_and_its_end_alone(tmp_path, tokenizer):
    workload = load_workload(_config(tmp_path, PAIR), tokenizer)
    text = [tokenizer.convert_ids_to_tokens(example["input_ids"]) for example in (*workload.train, *workload.test)]
    assert text == [["<s>", "a", "b", "c", "yes", "</s>"], ["<s>", "d", "e", "no", "no", "</s>"]]
    yes, no, end = tokenizer.convert_tokens_to_ids(["yes", "no", "</s>"])
    assert workload.train[0]["labels"] == [-100] * 4 + [yes, end]
    assert workload.test[0]["labels"] == [-100] * 3 + [no, no, end]
    assert workload.train[0]["topic"] == "x"


def test_an_end_token_of_the_tokenizer_does_not_split_prompt_and_answer(tmp_path):
    tokenizer = _tokenizer(ends=True)
    example = load_workload(_config(tmp_path, PAIR), tokenizer).train[0]
    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == ["<s>", "a", "b", "c", "yes", "</s>"]


def test_long_prompts_lose_their_middle():
    # Room for 8: the first quarter and the last three.
    assert fit(list(range(20)), [90, 91], 10) == ([0, 1, 14, 15, 16, 17, 18, 19], [90, 91])
    # A long answer keeps all but a quarter of the length for itself.
    assert fit(list(range(20)), list(range(100, 130)), 12) == ([17, 18, 19], list(range(100, 109)))


@given(st.integers(0, 60), st.integers(1, 60), st.integers(8, 50))
def test_fit_keeps_what_it_promises(prompt_length, answer_length, max_length):
    prompt, answer = list(range(prompt_length)), list(range(1000, 1000 + answer_length))
    kept_prompt, kept_answer = fit(prompt, answer, max_length)
    assert len(kept_prompt) + len(kept_answer) == min(prompt_length + answer_length, max_length)
    assert kept_answer == answer[: len(kept_answer)]
    if answer_length <= max_length - min(prompt_length, max_length // 4):
        assert kept_answer == answer
    assert kept_prompt == sorted(set(kept_prompt) & set(prompt))
    if kept_prompt:
        assert kept_prompt[-1] == prompt[-1]


def test_truncation_keeps_the_question_and_the_answer(tmp_path, tokenizer):
    rows = [
        {"context": " ".join("abcdefgh" * 20), "question": "x y z", "long_answer": "yes no yes", "split": split}
        for split in ("train", "test")
    ]
    example = load_workload(_config(tmp_path, rows, format="fed_med", max_length=24), tokenizer).train[0]
    tokens = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert len(tokens) == 24
    assert tokens[:3] == ["<s>", "a", "b"]
    assert tokens[-11:] == ["Question", ":", "x", "y", "z", "Answer", ":", "yes", "no", "yes", "</s>"]


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = _tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"set tokenizer\.eos_token"):
        load_workload(_config(tmp_path, PAIR), tokenizer)


# Formats


def test_every_format_writes_its_prompt(tmp_path):
    cases = {
        "fed_med": (
            {"question": "q?", "context": "c.", "long_answer": "a.", "meshes": ["M"]},
            "c.\n\nQuestion: q?\nAnswer:",
            " a.",
        ),
        "fed_aya": ({"prompt": "p", "answer": "a", "language": "te"}, "p\n", "a"),
        "fed_code": (
            {"instruction": "i", "input": "n", "output": "o"},
            "### Instruction:\ni\n\n### Input:\nn\n\n### Response:\n",
            "o",
        ),
        "jsonl": ({"prompt": "p ", "answer": 42}, "p ", "42"),
    }
    for form, (row, prompt, answer) in cases.items():
        train, _ = load_texts(_config(tmp_path, [{**row, "split": split} for split in ("train", "test")], format=form))
        assert (train[0].prompt, train[0].answer) == (prompt, answer), form
    assert train[0].topic == "topic-0"


def test_an_empty_input_leaves_no_section(tmp_path):
    rows = [{"instruction": "i", "input": "", "output": "o", "split": split} for split in ("train", "test")]
    train, _ = load_texts(_config(tmp_path, rows, format="fed_code"))
    assert train[0].prompt == "### Instruction:\ni\n\n### Response:\n"


def test_hub_columns_are_understood(tmp_path):
    context = {"contexts": ["one", "two"], "meshes": ["M"]}
    hub = {"question": "q", "context": context, "long_answer": "a", "split": "train"}
    train, _ = load_texts(_config(tmp_path, [hub, {**hub, "split": "test"}], format="fed_med"))
    assert train[0].prompt.startswith("one\ntwo\n\n")
    assert train[0].terms == ["M"]
    aya = {"inputs": "p", "targets": "a", "language": "Telugu", "split": "train"}
    train, _ = load_texts(_config(tmp_path, [aya, {**aya, "split": "test"}], format="fed_aya"))
    assert (train[0].prompt, train[0].topic) == ("p\n", "Telugu")


def test_columns_topic_and_client_can_be_named(tmp_path, tokenizer):
    rows = [
        {"q": {"text": "a"}, "reply": "yes", "ward": "x", "site": 7, "split": "train"},
        {"q": {"text": "b"}, "reply": "no", "ward": "y", "site": 8, "split": "test"},
    ]
    config = _config(
        tmp_path,
        rows,
        columns={"prompt": "q.text", "answer": "reply"},
        topic_column="ward",
        client_column="site",
    )
    example = load_workload(config, tokenizer).train[0]
    assert (example["topic"], example["client"]) == ("x", "7")


def test_demo_rows(tmp_path, monkeypatch, tokenizer):
    train, test = load_texts(DataConfig(train_limit=30, test_limit=7))
    assert (len(train), len(test)) == (30, 7)
    assert all(text.answer and text.topic and text.topic in text.prompt for text in train)
    assert not {text.prompt for text in train} & {text.prompt for text in test}


# Splits


def test_groups_stay_on_one_side(tmp_path):
    rows = [{"prompt": f"p{index}", "answer": "a", "group": f"g{index // 3}"} for index in range(90)]
    train, test = load_texts(_config(tmp_path, rows, test_fraction=0.2))
    assert len(test) == 18
    assert not {text.group for text in train} & {text.group for text in test}
    random.Random(0).shuffle(rows)
    _, again = load_texts(_config(tmp_path, rows, test_fraction=0.2))
    assert {text.prompt for text in again} == {text.prompt for text in test}


def test_rows_without_group_do_not_leak_their_prompt(tmp_path):
    rows = [{"prompt": f"p{index % 10}", "answer": str(index), "group": None} for index in range(40)]
    train, test = load_texts(_config(tmp_path, rows))
    assert not {text.prompt for text in train} & {text.prompt for text in test}
    assert len(train) + len(test) == 40


def test_a_group_on_both_sides_of_the_datas_own_split_is_refused(tmp_path):
    rows = [{**row, "group": "g"} for row in PAIR]
    with pytest.raises(DataError, match=r"line 2: group 'g' is in test and also in train \(.*line 1\)"):
        load_texts(_config(tmp_path, rows))


def test_validation_rows_are_left_out(tmp_path):
    train, test = load_texts(_config(tmp_path, [*PAIR, {**PAIR[0], "split": "validation"}]))
    assert (len(train), len(test)) == (1, 1)


def test_validation_is_neither_trained_on_nor_test():
    """A tenth of the demo's training notes; the others stay, and no test note is among either."""
    train, test = load_texts(DataConfig())
    rest, validation = load_texts(DataConfig(), held_out="validation")
    assert len(validation) == 200
    assert len(rest) == 1800
    prompts = [{text.prompt for text in part} for part in (train, test, rest, validation)]
    assert prompts[2] | prompts[3] == prompts[0]
    assert not prompts[2] & prompts[3]
    assert not prompts[3] & prompts[1]
    assert load_texts(DataConfig(), held_out="validation")[1] == validation
    assert len(load_texts(DataConfig(test_limit=30), held_out="validation")[1]) == 30


def test_the_datas_own_validation_rows_are_used(tmp_path):
    rows = [*PAIR, {**PAIR[0], "answer": "mine", "split": "dev"}]
    train, validation = load_texts(_config(tmp_path, rows), held_out="validation")
    assert len(train) == 1
    assert [text.answer for text in validation] == ["mine"]


def test_limits_draw_the_same_rows_in_order(tmp_path):
    rows = [{"prompt": f"{index:03}", "answer": "a", "split": "train"} for index in range(100)]
    config = _config(tmp_path, [*rows, {**rows[0], "split": "test"}], train_limit=10)
    train, _ = load_texts(config)
    prompts = [text.prompt for text in train]
    assert len(prompts) == 10
    assert prompts == sorted(prompts)
    assert prompts == [text.prompt for text in load_texts(config)[0]]
    assert max(prompts) > "050"


def test_a_client_needs_no_test_rows(tmp_path, tokenizer):
    config = _config(tmp_path, [PAIR[0], PAIR[0]])
    workload = load_workload(config, tokenizer, need_test=False)
    assert (len(workload.train), workload.test) == (2, [])
    unsplit = [{"prompt": "a", "answer": "yes"}] * 3
    assert len(load_workload(_config(tmp_path, unsplit), tokenizer, need_test=False).train) == 3


# Bad input


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"question": "q"}], {}, r"line 1 has no column 'prompt' .*found 'question'.*--data\.columns\.prompt"),
        ([{"prompt": "p"}], {}, r"no column 'answer' or 'completion'"),
        ([PAIR[0], {**PAIR[1], "answer": "  "}], {}, r"line 2: the answer is empty, so every label would be masked"),
        ([{**PAIR[0], "answer": None}], {}, r"line 1: the answer must be text, got None"),
        ([{**PAIR[0], "answer": True}], {}, r"the answer must be text, got True \(bool\)"),
        ([{**PAIR[0], "split": "holdout"}, PAIR[1]], {}, r"split must be train or test, got 'holdout'"),
        ([PAIR[0], {"prompt": "p", "answer": "a"}], {}, r"line 2: split must be train or test, got None"),
        ([PAIR[0]], {}, r"has no test rows"),
        ([PAIR[1]], {}, r"has no train rows"),
        ([], {}, r"holds no rows"),
        ([{"prompt": "p", "answer": "a"}] * 3, {}, r"all 3 rows are of one group"),
        (PAIR, {"client_column": "site"}, r"line 1 has no value in column 'site' \(data\.client_column\)"),
        (PAIR, {"columns": {"propmt": "x"}}, r"no role 'propmt'; its roles are prompt, answer"),
        (PAIR, {"format": "fed_aya"}, r"no column 'language'"),
        (PAIR, {"format": "fed_med"}, r"no column 'question'.*found 'prompt'"),
    ],
)
def test_bad_rows_name_place_and_remedy(tmp_path, tokenizer, rows, settings, message):
    with pytest.raises(DataError, match=message):
        load_workload(_config(tmp_path, rows, **settings), tokenizer)


def test_an_answer_without_tokens_is_refused(tmp_path, tokenizer):
    tokenizer = _tokenizer()
    tokenizer.backend_tokenizer.normalizer = Replace("zero", "")
    rows = [PAIR[0], {**PAIR[1], "answer": "zero"}]
    with pytest.raises(DataError, match="line 2: the answer has no tokens"):
        load_workload(_config(tmp_path, rows), tokenizer)


@pytest.mark.parametrize(("text", "message"), [("{bad\n", "line 1 is not JSON"), ("\n[1]\n", "line 2 holds a list")])
def test_malformed_lines(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_texts(DataConfig(path=str(path), format="jsonl"))


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/no/such/folder/file"])
def test_missing_files_are_not_looked_for_on_the_hub(path):
    with pytest.raises(DataError, match=r"there is no file .*--data\.path FILE\.jsonl"):
        load_texts(DataConfig(path=path, format="jsonl"))


def test_hub_data_sets_bring_their_splits(monkeypatch):
    import datasets

    rows = {"train": [{"prompt": "a", "answer": "b"}], "validation": [{"prompt": "c", "answer": "d"}]}
    data = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in rows.items()})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: asked.append((path, name)) or data)
    train, test = load_texts(DataConfig(path="org/name", subset="small", format="jsonl"))
    assert asked == [("org/name", "small")]
    assert ([text.prompt for text in train], [text.prompt for text in test]) == (["a"], ["c"])
    data["test"] = datasets.Dataset.from_list([{"prompt": "e", "answer": "f"}])
    assert [text.prompt for text in load_texts(DataConfig(path="org/name", format="jsonl"))[1]] == ["e"]


def test_an_unreachable_hub_names_the_way_out(monkeypatch):
    import datasets

    def offline(path, name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"cannot load the data set 'org/name'.*Without network, type --data\.path"):
        list(rows_module.read_rows(DataConfig(path="org/name", format="jsonl")))


@pytest.mark.parametrize(
    "wrong",
    [{"max_length": 4}, {"topics": 0}, {"test_fraction": 1.0}, {"test_limit": -1}, {"path": ""}, {"format": "x"}],
)
def test_settings_have_ranges(wrong):
    with pytest.raises(ConfigError):
        DataConfig(**{"path": "demo", "format": "demo", **wrong})


# Topics


def test_topics_follow_the_words():
    rng = random.Random(0)
    themes = {name: [f"{name}{index}" for index in range(12)] for name in ("heart", "lung", "bone")}
    labels = [rng.choice(list(themes)) for _ in range(150)]
    documents = [" ".join(rng.sample(themes[label], 6)) + " patient study" for label in labels]
    topics = cluster_topics(documents, 3)
    pairs = Counter(zip(labels, topics, strict=True))
    assert len(pairs) == 3
    assert topics == cluster_topics(documents, 3)
    # Terms may also come as lists, and test documents take the topics that training documents made.
    as_lists = cluster_topics([document.split() for document in documents], 3, num_fit=100)
    assert len(Counter(zip(labels, as_lists, strict=True))) == 3


@pytest.mark.parametrize("documents", [["same"] * 5, ["", "", ""], ["one"], [["a"], []]])
def test_topics_of_documents_with_nothing_to_tell_apart(documents):
    assert len(cluster_topics(documents, 8)) == len(documents)


# Batches


def test_collate_pads_on_the_right():
    examples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "topic": "x"},
        {"input_ids": [8], "labels": [8], "topic": "y"},
    ]
    batch = collate(examples, pad_id=9)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_collator_pickles_and_refuses_nothing_silently():
    collator = pickle.loads(pickle.dumps(Collator(3)))
    assert collator([{"input_ids": [1], "labels": [1]}])["input_ids"].tolist() == [[1]]
    with pytest.raises(DataError, match="no examples"):
        collator([])


# The real files


@pytest.mark.parametrize(
    ("name", "sizes"), [("fed_med", (736, 157)), ("fed_aya", (9786, 1604)), ("fed_code", (4919, 970))]
)
def test_real_data_load_without_leaks(name, sizes):
    path = SHARED_DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here: test data that does not travel with the repository")
    train, test = load_texts(DataConfig(path=str(path), format=name))
    assert (len(train), len(test)) == sizes
    counts = Counter(text.topic for text in train)
    assert len(counts) == 8
    assert min(counts.values()) > len(train) / 100
    assert not {text.group for text in train if text.group} & {text.group for text in test if text.group}

import subprocess
import sys

import pytest
import torch

from fedfstq_hf.demo import load_model, load_tokenizer, make_examples, model_path


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_importing_the_demo_does_not_import_torch():
    code = "import sys, fedfstq_hf.demo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_data_stays_below_1_mb():
    assert sum(file.stat().st_size for file in model_path().rglob("*") if file.is_file()) <= 1_000_000


def test_loads_offline_by_the_auto_classes(monkeypatch):
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1]);"
        "assert type(m).__name__ == 'LlamaForCausalLM' and len(t) == m.config.vocab_size"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    subprocess.run([sys.executable, "-c", code, str(model_path())], check=True)


def test_model_is_float32_unless_asked_otherwise():
    assert load_model().dtype == torch.float32
    assert load_model(torch.bfloat16).dtype == torch.bfloat16


def test_texts_survive_the_tokenizer_and_pieces_join(tokenizer):
    for example in make_examples(100, 0, "test"):
        prompt, answer = (tokenizer(example[key])["input_ids"] for key in ("prompt", "answer"))
        assert tokenizer.decode(prompt) == example["prompt"]
        assert tokenizer(f"{example['prompt']} {example['answer']}")["input_ids"] == prompt + answer
        assert not {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} & set(prompt + answer)


def test_any_text_has_tokens(tokenizer):
    text = "übelkeit 37,5 °C → θ 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompts_are_long_enough_to_shorten_and_fit(tokenizer):
    lengths = sorted(len(tokenizer(e["prompt"])["input_ids"]) for e in make_examples(300, 0))
    assert lengths[len(lengths) // 2] >= 120
    assert lengths[-1] <= 256


def test_base_alone_is_near_chance(tokenizer):
    model, hits, examples = load_model(), 0, make_examples(100, 0, "test")
    for example in examples:
        prompt = tokenizer(example["prompt"])["input_ids"]
        answer = [*tokenizer(example["answer"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            guesses = model(input_ids=torch.tensor([prompt + answer])).logits[0].argmax(-1)
        hits += guesses[len(prompt) - 1 : -1].tolist() == answer
    assert hits / len(examples) <= 0.1

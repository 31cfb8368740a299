"""recipes/benchmarks/token_recall.py on two finished runs, against sensitivities found in another way."""

import argparse
import json
import sys
from collections import Counter

import pytest
import torch
from peft import PeftModel

from fedfstq_hf.recipe import Recipe, load_recipe
from fedfstq_hf.running.foundation import load_base
from fedfstq_hf.simulation.runner import Simulation
from fedfstq_hf.workloads import Collator, load_workload
from recipes.benchmarks import token_recall


@pytest.fixture(scope="module")
def runs(tiny_recipe, tmp_path_factory):
    """A finished run of each method."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("fedavg", "fstq"):
        recipe = load_recipe(tiny_recipe, {"methods": method, "seeds": 1, "federation.rounds": 1})
        Simulation(recipe, root / method, progress=False).run()
    return root


def test_the_reference_recalls_all_and_others_a_share(runs, monkeypatch, capsys, tmp_path):
    out = tmp_path / "recall.json"
    arguments = ["token_recall.py", str(runs / "fedavg"), str(runs / "fstq"), "--rows", "4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    token_recall.main()
    recall = json.loads(out.read_text())["token_recall"]
    assert recall["fedavg"] == {"0": 1.0}
    assert 0 < recall["fstq"]["0"] <= 1
    assert "fedavg  seed 0: 1.000" in capsys.readouterr().out


def test_a_sensitivity_is_the_squared_gradient_at_the_embedding(runs):
    folder = runs / "fstq"
    recipe = Recipe.from_dict(json.loads((folder / "recipe.json").read_text()), "recipe")
    found = token_recall.sensitivities(folder, recipe, argparse.Namespace(model=None, rows=1))
    base, tokenizer = load_base(recipe.model, recipe.dtype)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    batch = Collator(tokenizer.pad_token_id)(load_workload(recipe.data, tokenizer).test[:1])
    table = model.get_input_embeddings().weight.requires_grad_(True)
    output = model.get_output_embeddings()
    if output is not None and output.weight is table:  # else the gradient would be of both uses
        output.weight = torch.nn.Parameter(table.detach().clone())
    (gradient,) = torch.autograd.grad(model(**batch).loss, table)
    once = [token for token, count in Counter(batch["input_ids"][0].tolist()).items() if count == 1]
    assert len(once) > 3
    assert torch.allclose(found[once].float(), gradient[once].square().sum(-1), rtol=1e-3, atol=1e-12)
    assert bool(found[[token for token in range(len(found)) if token not in batch["input_ids"]]].isinf().all())

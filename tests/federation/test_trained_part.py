"""Only what is trained travels: LoRA's factors A may stay at home."""

import pytest
import torch

from fedfstq_hf.codec import Schema
from fedfstq_hf.codec.schema import TrainedPart
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe import MethodSettings

WHOLE = Schema.from_state_dict(
    {
        "m.lora_A.weight": torch.zeros(2, 3),
        "m.lora_B.weight": torch.zeros(4, 2),
        "n.lora_A.weight": torch.zeros(2, 4),
        "n.lora_B.weight": torch.zeros(1, 2),
    }
)


def test_all_of_it_is_the_vector_itself():
    trained, vector = TrainedPart.of(WHOLE, freeze_a=False), torch.arange(24.0)
    assert trained.schema is WHOLE
    assert trained.take(vector) is vector
    assert trained.put(vector) is vector


def test_the_factors_b_in_their_order():
    trained = TrainedPart.of(WHOLE, freeze_a=True)
    assert [spec.name for spec in trained.schema.tensors] == ["m.lora_B.weight", "n.lora_B.weight"]
    part = trained.take(torch.arange(24.0))
    assert part.tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 22, 23]
    expected = torch.arange(24.0)
    expected[:6] = 0
    expected[14:22] = 0
    assert torch.equal(trained.put(part), expected)


@pytest.mark.parametrize(("name", "match"), [("m.lora_A.weight", "no others"), ("m.vera_lambda_b", "no factor A")])
def test_an_adapter_without_both_factors(name, match):
    with pytest.raises(ConfigError, match=match):
        TrainedPart.of(Schema.from_state_dict({name: torch.zeros(2, 2)}), freeze_a=True)


@pytest.mark.parametrize("other", [{"scaffold": True}, {"learned_binarisation": True, "codec": "fedbat"}])
def test_what_is_defined_over_the_whole_adapter_is_refused(other):
    with pytest.raises(ConfigError, match=r"freeze_a \(True\) and \w+ \(True\) cannot be combined"):
        MethodSettings(freeze_a=True, **other)

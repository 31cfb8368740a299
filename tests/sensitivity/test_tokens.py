"""TokenSensitivity: moving averages against values worked out by hand."""

import pytest
import torch

from fedfstq_hf.errors import AdapterMismatchError, ConfigError, DataError, NonFiniteError
from fedfstq_hf.sensitivity import TokenSensitivity


def test_first_update_gives_the_mean_of_occurrences():
    table = TokenSensitivity(5, rho=0.9)
    table.update(torch.tensor([[1, 2, 1]]), torch.tensor([[2.0, 7.0, 4.0]]))
    # bias correction: 0.1 * 3 / (1 - 0.9) = 3
    assert table.scores().tolist() == pytest.approx([float("inf"), 3.0, 7.0, float("inf"), float("inf")])


def test_second_update_mixes_and_corrects():
    table = TokenSensitivity(3, rho=0.9)
    table.update(torch.tensor([[0, 1]]), torch.tensor([[10.0, 1.0]]))
    table.update(torch.tensor([[0, 0]]), torch.tensor([[20.0, 40.0]]))
    # (0.9 * 0.1 * 10 + 0.1 * 30) / (1 - 0.81) = 3.9 / 0.19; id 1 was absent and stays
    assert table.scores()[:2].tolist() == pytest.approx([3.9 / 0.19, 1.0])
    assert table.state_dict()["count"].tolist() == [2, 1, 0]


def test_masked_positions_do_not_count_even_with_invalid_ids():
    table = TokenSensitivity(3)
    ids = torch.tensor([[0, -100], [2, 99]])
    g = torch.tensor([[1.0, float("nan")], [5.0, 1.0]])
    table.update(ids, g, torch.tensor([[True, False], [True, False]]))
    assert table.scores().tolist() == pytest.approx([1.0, float("inf"), 5.0])
    table.update(ids, g, torch.zeros(2, 2, dtype=torch.bool))
    assert table.state_dict()["count"].tolist() == [1, 0, 1]


def test_top_lists_seen_ids_highest_first():
    table = TokenSensitivity(6)
    table.update(torch.tensor([[4, 1, 3, 2]]), torch.tensor([[1.0, 9.0, 5.0, 5.0]]))
    assert table.top(3).tolist() == [1, 2, 3]
    assert table.top(100).tolist() == [1, 2, 3, 4]
    assert TokenSensitivity(3).top(2).tolist() == []


def test_state_round_trips_and_later_updates_agree():
    one = TokenSensitivity(4)
    one.update(torch.tensor([[0, 1]]), torch.tensor([[1.0, 2.0]]))
    two = TokenSensitivity(4)
    two.load_state_dict(one.state_dict())
    before = one.state_dict()
    for table in (one, two):
        table.update(torch.tensor([[1, 3]]), torch.tensor([[5.0, 6.0]]))
    assert torch.equal(one.scores(), two.scores())
    assert before["ema"].tolist() == pytest.approx([0.1, 0.2, 0.0, 0.0])  # a state stays as it was taken
    assert before["count"].tolist() == [1, 1, 0, 0]


def test_a_non_finite_gradient_changes_nothing():
    table = TokenSensitivity(3)
    table.update(torch.tensor([[0]]), torch.tensor([[1.0]]))
    before = table.scores()
    with pytest.raises(NonFiniteError):
        table.update(torch.tensor([[0, 1]]), torch.tensor([[1.0, float("inf")]]))
    assert torch.equal(table.scores(), before)


def test_bad_input():
    table = TokenSensitivity(3)
    with pytest.raises(DataError, match=r"0 \.\. 2"):
        table.update(torch.tensor([[3]]), torch.tensor([[1.0]]))
    with pytest.raises(DataError, match=r"span -1 \.\. 2"):
        table.update(torch.tensor([[2, -1]]), torch.tensor([[1.0, 1.0]]))
    with pytest.raises(DataError, match="same"):
        table.update(torch.tensor([[1, 2]]), torch.tensor([[1.0]]))
    with pytest.raises(AdapterMismatchError, match=r"\(3,\)"):
        table.load_state_dict(TokenSensitivity(4).state_dict())
    with pytest.raises(ConfigError, match="rho"):
        TokenSensitivity(3, rho=1.0)
    with pytest.raises(ConfigError, match="vocab_size"):
        TokenSensitivity(0)

"""Error feedback: nothing is lost, nothing is sent twice."""

import pytest
import torch

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.client.outbox import ErrorFeedback


def test_hand_computed_round():
    feedback = ErrorFeedback(decay=0.5)
    corrected = feedback.corrected(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 0.0, -2.0]))
    assert corrected.tolist() == [3.0, 2.0, 2.0]
    sent = SparseUpdate(3, torch.tensor([0, 2]), torch.tensor([2.5, 2.0]))
    assert feedback.after(corrected, sent).tolist() == [0.5, 2.0, 0.0]


def test_first_round_and_decay_zero_send_the_plain_delta_without_aliasing_it():
    delta = torch.tensor([1.0, 2.0])
    for corrected in (ErrorFeedback().corrected(delta, None), ErrorFeedback(0.0).corrected(delta, torch.ones(2))):
        assert torch.equal(corrected, delta)
        assert corrected.data_ptr() != delta.data_ptr()


def test_dense_and_sparse_updates_leave_the_same_residual():
    corrected = torch.tensor([1.0, 2.0, 3.0])
    sparse = SparseUpdate(3, torch.tensor([1]), torch.tensor([1.5]))
    dense = SparseUpdate(3, None, sparse.to_dense())
    assert torch.equal(ErrorFeedback().after(corrected, sparse), ErrorFeedback().after(corrected, dense))


def test_what_was_sent_plus_the_residual_is_the_whole_history():
    feedback, residual, total, sent_total = ErrorFeedback(), None, torch.zeros(50), torch.zeros(50)
    for step in range(20):
        delta = torch.randn(50, generator=torch.Generator().manual_seed(step))
        corrected = feedback.corrected(delta, residual)
        top = corrected.abs().topk(3).indices.sort().values
        sent = SparseUpdate(50, top, corrected[top])
        residual = feedback.after(corrected, sent)
        total = total + delta
        sent_total = sent_total + sent.to_dense()
    assert torch.allclose(sent_total + residual, total, atol=1e-5)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ConfigError, match="decay"):
        ErrorFeedback(decay)

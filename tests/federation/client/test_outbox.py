"""An outbox without a federation: what is owed after a message, and a state that comes back whole."""

import pytest
import torch

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.federation.client.outbox import ErrorFeedback, Outbox, Pending

DELTA = torch.tensor([1.0, -2.0, 3.0])


def sent(*values):
    return SparseUpdate(3, None, torch.tensor(values))


def sending(outbox, round=0, **changes):
    settings = {"message": b"sealed", "readable": b"readable", "refinement": None} | changes
    return outbox.with_pending(Pending(round, corrected=outbox.corrected(DELTA), **settings))


def test_what_an_accepted_message_left_out_is_owed_and_one_that_was_not_used_changes_nothing():
    first = sending(Outbox(ErrorFeedback(0.5))).settled(sent(1.0, 0.0, 2.0))
    assert first.pending is None
    assert first.residual.tolist() == [0.0, -2.0, 1.0]
    assert first.corrected(DELTA).tolist() == [1.0, -3.0, 3.5]
    unused = sending(first, 1).settled(None)
    assert (unused.pending, unused.residual.tolist()) == (None, [0.0, -2.0, 1.0])


@pytest.mark.parametrize(("decay", "left"), [(0.0, 1.0), (1.0, 0.0)])
def test_nothing_is_kept_without_error_feedback_or_after_a_lossless_message(decay, left):
    outbox = sending(Outbox(ErrorFeedback(decay)))
    assert outbox.settled(sent(*(DELTA - left).tolist())).residual is None


@pytest.mark.parametrize("changes", [{}, {"readable": b"sealed"}, {"refinement": b"more"}], ids=str)
def test_a_state_comes_back_whole(changes):
    owing = sending(Outbox(ErrorFeedback())).settled(sent(0.0, 0.0, 0.0))
    for outbox in (Outbox(ErrorFeedback()), owing, sending(owing, 7, **changes)):
        state = outbox.state_dict() | {"other": torch.zeros(1)}
        again = Outbox(ErrorFeedback()).load_state_dict(state)
        assert again.state_dict().keys() == outbox.state_dict().keys()
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in outbox.state_dict().items())
        assert (again.pending is None) == (outbox.pending is None)
        if outbox.pending is not None:
            kept, pending = again.pending, outbox.pending
            assert (kept.round, kept.message, kept.readable) == (pending.round, pending.message, pending.readable)
            assert (kept.refinement, kept.sha256) == (pending.refinement, pending.sha256)

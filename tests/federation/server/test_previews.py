"""How much of a preview counts, for how long, and in which rounds there are any."""

import pytest
from light_refining import close, federation, previews, refinements

from fedfstq_hf.federation.server.coordinator import Coordinator


@pytest.mark.parametrize(("share", "expected"), [(0.0, 2.0), (0.5, 2.125), (0.75, 2.1875), (1.0, 2.25)])
def test_part_of_what_previews_got_wrong_stays(tmp_path, share, expected):
    mailbox = federation(tmp_path, rounds=3, preview_correction=share)
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=2, b=4)  # P = 3.5
    assert close(coordinator) == 1.75
    refinements(mailbox, 0, a=1, b=5)  # R = 4: half of it is still to come, and half of the 0.5 that P is short
    previews(mailbox, 1, a=0, b=0)
    assert close(coordinator) == 1.75 + expected


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_whatever_is_taken_back_previews_without_refinements_count_once(tmp_path, share):
    mailbox = federation(tmp_path, rounds=3, preview_correction=share)
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=2, b=4)
    close(coordinator)
    previews(mailbox, 1, a=0, b=0)
    assert close(coordinator) == 3.5  # the previews stand in for the refinements: the other half of them


def test_after_the_rounds_with_previews_messages_count_in_full_at_once(tmp_path):
    mailbox = federation(tmp_path, rounds=4, preview_rounds=1)
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=2, b=4)  # 3.5
    assert close(coordinator) == 1.75
    refinements(mailbox, 0, a=1, b=5)  # 4
    previews(mailbox, 1, a=-2, b=2)  # 1, no longer a preview
    assert close(coordinator) == 1.75 + 1 + (4 - 1.75)
    assert [entry.client_id for entry in coordinator.record.refinements] == ["a", "b"]
    refinements(mailbox, 1, a=8, b=8)  # that nobody asked for
    previews(mailbox, 2, a=0, b=4)  # 3
    assert close(coordinator) == 5 + 3
    assert coordinator.record.updates == coordinator.record.accepted
    previews(mailbox, 3, a=4, b=4)
    assert close(coordinator) == 8 + 4
    assert coordinator.finished

"""Places: what one client may write, and the paths of messages, metrics and attachments there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedfstq_hf.federation.mailbox.hub.repo import HubRepo
from fedfstq_hf.federation.mailbox.protocol import ATTACHMENTS

MARKER_PATH = ".fedfstq.json"
"""Says which federation, and which client of it, a repo belongs to."""

PULL_REQUEST_TITLE = "Updates of client "
"""Of the pull request whose first commit is a client's first message."""

_ROUND = "[0-9]{6,}"
_CLIENT = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_ATTACHED = "|".join(map(re.escape, ATTACHMENTS))
_OURS_ANYWHERE = rf"\.gitattributes|{re.escape(MARKER_PATH)}"
_OURS = {
    False: re.compile(rf"{_OURS_ANYWHERE}|(rounds|refinements)/{_ROUND}\.safetensors|metrics\.json|{_ATTACHED}"),
    True: re.compile(
        rf"{_OURS_ANYWHERE}|rounds/{_ROUND}/(deltas|refinements)/{_CLIENT}\.safetensors"
        rf"|metrics/{_CLIENT}\.json|attachments/{_CLIENT}/({_ATTACHED})"
    ),
}
_MESSAGE = re.compile(rf"(rounds|refinements)/{_ROUND}\.safetensors")


def round_folder(round: int, refinements: bool = False) -> str:
    """Where a shared repo has the messages of a round, or their refinements."""
    return f"rounds/{round:06d}/{'refinements' if refinements else 'deltas'}"


def is_ours(path: str, *, shared: bool) -> bool:
    """Whether this package writes such a file into a client's repo, or into one that clients share."""
    return _OURS[shared].fullmatch(path) is not None


def is_message(path: str) -> bool:
    """Whether a file of a client's own repo is one of its messages."""
    return _MESSAGE.fullmatch(path) is not None


@dataclass(frozen=True)
class Place:
    """What one client may write: a branch or pull request of a repo, `shared` with others or its own."""

    repo: HubRepo
    revision: str
    shared: bool = False

    def update_path(self, round: int, client_id: str, refinement: bool = False) -> str:
        """Of the client's message for a round, or its second one."""
        if self.shared:
            return f"{round_folder(round, refinement)}/{client_id}.safetensors"
        return f"{'refinements' if refinement else 'rounds'}/{round:06d}.safetensors"

    def metrics_path(self, client_id: str) -> str:
        """Of the metrics that the client posted."""
        return f"metrics/{client_id}.json" if self.shared else "metrics.json"

    def attachment_path(self, client_id: str, name: str) -> str:
        """Of a file that the client sends beside its messages."""
        return f"attachments/{client_id}/{name}" if self.shared else name

"""How large the files of a global repo may be: sizes are checked before anything is downloaded."""

from __future__ import annotations

from fedfstq_hf.errors import MailboxError, MessageError
from fedfstq_hf.federation import control, record
from fedfstq_hf.federation.limits import MAX_SPEC_BYTES
from fedfstq_hf.federation.mailbox.hub import address as paths
from fedfstq_hf.federation.mailbox.hub.repo import HubRepo, RemoteFile
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_CONFIG_FILE, RECORD_FILE, SPEC_FILE

MAX_LAYOUT_BYTES = 1000
MAX_METRICS_BYTES = 10**6
_MAX_TENSOR_BYTES = 8 * 10**9
_MAX_ROOT_BYTES = 64 * 10**6
_MOST = {
    paths.LAYOUT_PATH: MAX_LAYOUT_BYTES,
    paths.CONTROL_PATH: control.MAX_BYTES,
    paths.METRICS_PATH: 16 * MAX_METRICS_BYTES,  # all evaluations of the coordinator, where a client's are its own
    paths.head_path(SPEC_FILE): MAX_SPEC_BYTES,
    paths.head_path(ADAPTER_CONFIG_FILE): 10**6,
}


def most_bytes(path: str) -> int:
    """The most bytes of a file of the global repo; tensors are as large as the adapter, which the reader may know."""
    if path in _MOST:
        return _MOST[path]
    if path.endswith(f"/{RECORD_FILE}"):
        return record.MAX_BYTES
    return _MAX_TENSOR_BYTES if path.endswith(".safetensors") else _MAX_ROOT_BYTES


def read_global(repo: HubRepo, path: str, *, revision: str = "main", max_bytes: int | None = None) -> RemoteFile | None:
    """A file of the global repo, None where there is none.

    Args:
        max_bytes: less than the path allows.

    Raises:
        MailboxError: it is too large; it was not downloaded.
    """
    most = most_bytes(path) if max_bytes is None else min(max_bytes, most_bytes(path))
    try:
        return repo.read(path, revision=revision, max_bytes=most)
    except MessageError as error:
        raise MailboxError(f"{path} of {repo.repo_id} is too large. {error}") from None

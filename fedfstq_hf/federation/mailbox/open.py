"""Opening a mailbox by its address. No other module knows which kinds of mailboxes there are."""

from __future__ import annotations

from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation.mailbox.protocol import LAYOUTS, UNATTENDED_SECONDS, Mailbox


def open_mailbox(
    address: str,
    *,
    create: bool = False,
    layout: str | None = None,
    private: bool = True,
    token: str | None = None,
    client_repo: str | None = None,
    patience: float = UNATTENDED_SECONDS,
) -> Mailbox:
    """The mailbox at an address: `hf://org/repo`, or the path of a folder.

    Args:
        create: a federation is going to be founded there, so the repo may be missing.
        private: whether a new federation's Hub repos are private.
        layout: of a new Hub mailbox, one of `LAYOUTS`; an existing one knows its own.
        token: for the Hub, where it is not in `HF_TOKEN` or stored by `hf auth login`.
        patience: seconds for which a request to the Hub is repeated; see `Mailbox.set_patience`.
        client_repo: Hub repo that the client writes its messages to, where it is not `ORG/RUN-CLIENT`.

    Raises:
        MailboxError: the address has a scheme that no mailbox serves.
        ConfigError: the layout is unknown, or a folder is given what is for the Hub.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"Unknown mailbox layout {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    if address.startswith("hf://"):
        from fedfstq_hf.federation.mailbox.hub.mailbox import HubMailbox

        return HubMailbox(
            address,
            create=create,
            layout=layout,
            private=private,
            token=token,
            client_repo=client_repo,
            patience=patience,
        )
    if "://" in address and not address.startswith("file://"):
        scheme = address.split("://", 1)[0]
        raise MailboxError(
            f"No mailbox serves {scheme}:// addresses (given: {address}); give hf://ORG/REPO or the path of a folder."
        )
    if layout is not None:
        raise ConfigError(f"A folder mailbox has no layouts (given: {layout!r}); leave it out, or give hf://ORG/REPO.")
    if client_repo is not None:
        raise ConfigError(f"repo is for a federation on the Hub; {address} is a folder. Leave repo out.")
    from fedfstq_hf.federation.mailbox.folder import FolderMailbox

    return FolderMailbox(address.removeprefix("file://"))

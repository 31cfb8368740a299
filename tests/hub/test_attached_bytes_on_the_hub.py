"""Sizes of attachments on the loopback Hub, in each layout, without reading them."""

import pytest

from fedfstq_hf.federation.mailbox.protocol import SALIENCY_FILE
from tests.loopback_hub.federation import LAYOUTS, HubFederation
from tests.loopback_hub.loopback import LoopbackHub


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attachments_are_sized_where_they_lie(hub_here: LoopbackHub, layout: str) -> None:
    federation = HubFederation(hub_here, layout)
    client = federation.client("a")
    client.step()  # its first message makes its place
    federation.mailbox(federation.tokens["a"]).post_attachment("a", SALIENCY_FILE, bytes(12_345))
    owner = federation.mailbox(federation.owner)
    assert [owner.attachment_bytes(name, SALIENCY_FILE) for name in ("a", "b")] == [12_345, 0]

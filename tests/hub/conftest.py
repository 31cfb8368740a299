"""The loopback Hub's fixtures, for tests of the Hub mailbox."""

from tests.loopback_hub.fixtures import hub, hub_client, hub_here, remote_hub

__all__ = ["hub", "hub_client", "hub_here", "remote_hub"]

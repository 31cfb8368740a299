"""The fixtures of tests/hub/fixtures.py."""

from tests.hub.fixtures import hub, hub_client, hub_here, remote_hub

__all__ = ["hub", "hub_client", "hub_here", "remote_hub"]

"""The loopback Hub, for attacks by and on its repos."""

from __future__ import annotations

from tests.loopback_hub.fixtures import hub, hub_here

__all__ = ["hub", "hub_here"]

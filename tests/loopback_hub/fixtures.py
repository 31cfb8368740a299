"""Fixtures around the loopback Hub. Elsewhere: `from tests.loopback_hub.fixtures import hub`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, close_session, constants

from tests.loopback_hub.loopback import LoopbackHub, RemoteHub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A loopback Hub in this process, empty."""
    hub = LoopbackHub(tmp_path / "hub-homes")
    yield hub
    hub.close()


@pytest.fixture
def remote_hub(tmp_path: Path) -> Iterator[RemoteHub]:
    """A loopback Hub in a process of its own, empty: for many client processes."""
    hub = RemoteHub.start(tmp_path / "hub-homes")
    yield hub
    hub.close()


@pytest.fixture
def hub_here(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """The loopback Hub as this process's Hub.

    huggingface_hub reads HF_* at import, so its constants are set here: endpoint, online, no Xet, an empty cache.
    """
    home = Path(hub.env()["HF_HOME"])
    own = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint}
    for name, text in own.items():
        monkeypatch.setenv(name, text)
    values: dict[str, object] = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
    close_session()  # an earlier one would keep the proxies it was made with
    yield hub
    close_session()


@pytest.fixture
def hub_client(hub_here: LoopbackHub) -> Callable[..., HfApi]:
    """`hub_client(token)`: the real client in this process, talking to `hub`."""
    return lambda token=False: HfApi(endpoint=hub_here.endpoint, token=token)

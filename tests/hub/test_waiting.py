"""Waiting for the Hub: for as long as was said, aloud, and for ever only where nobody is kept from stopping."""

import logging
import math

import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from fedfstq_hf.errors import MailboxError, MailboxUnavailableError
from fedfstq_hf.federation.mailbox.hub.http import Patience


class Clock:
    def __init__(self):
        self.now = 0.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def failing(status, clock, said="", until=math.inf):
    """A request that the Hub answers with an error, before some hour."""
    tries = []

    def request():
        tries.append(clock())
        if clock() >= until:
            return "done"
        response = httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/x"))
        raise HfHubHTTPError(said or "no", response=response, server_message=said)

    return request, tries


def patience(seconds):
    clock = Clock()
    return Patience(seconds, clock=clock, sleep=clock.sleep), clock


def test_who_asks_for_an_hour_is_asked_until_the_time_is_over():
    waiting, clock = patience(900.0)
    request, tries = failing(429, clock, "Retry after about 1 hour")
    with pytest.raises(MailboxUnavailableError, match="for 900 s"):
        waiting.call("look", request)
    assert tries[-1] == pytest.approx(900.0)
    assert len(tries) <= 5


def test_an_outage_of_hours_is_waited_for_aloud(caplog):
    caplog.set_level(logging.WARNING)
    waiting, clock = patience(math.inf)
    request, _ = failing(503, clock, until=3 * 3600.0)
    assert waiting.call("read round.json of lab/run", request) == "done"
    assert clock.now < 3 * 3600 + 400
    spoken = [record.getMessage() for record in caplog.records]
    assert 100 < len(spoken) < 200  # once a minute
    assert spoken[0].startswith("Could not read round.json of lab/run: ")
    assert spoken[0].endswith("Waiting until that works.")


def test_what_passes_at_once_is_not_told_and_after_five_seconds_it_is(caplog):
    caplog.set_level(logging.WARNING)
    waiting, clock = patience(30.0)
    waiting.call("look", failing(500, clock, until=2.0)[0])
    assert caplog.records == []
    waiting, clock = patience(30.0)
    waiting.call("look", failing(500, clock, until=12.0)[0])
    (record,) = caplog.records
    assert record.getMessage().startswith("Could not look: HTTP 500: no. Waiting for up to ")


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_waiting_does_not_help_is_said_at_once(status):
    waiting, clock = patience(math.inf)
    with pytest.raises(MailboxError) as raised:
        waiting.call("look", failing(status, clock)[0])
    assert not isinstance(raised.value, MailboxUnavailableError)
    assert clock.slept == []

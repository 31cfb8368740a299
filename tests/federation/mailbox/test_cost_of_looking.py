"""A look at the mailbox costs in proportion to its clients; counted in operations, not in time."""

import dataclasses
import sys

import pytest
from light import SCHEMA, initial_state, make_spec
from light_updates import ones, post

from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.control import Control, Enrolment
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.protocol import UpdateRef
from fedfstq_hf.federation.server.coordinator import Coordinator

SIZE = 40


def federation(path, clients, waiting, **changes):
    """Enrolled clients; of some a message that will be refused lies there."""
    names = [f"c{number:04}" for number in range(clients)]
    mailbox = FolderMailbox(path, durable=False)
    spec = make_spec(min_clients=clients, rounds=9, **changes)
    adapter = adapter_file.dump(initial_state())
    control = Control(clients={name: Enrolment() for name in names})
    found_federation(mailbox, spec, adapter, b"{}\n", control=control, now=0.0)
    for name in names[:waiting]:
        mailbox.post_update(0, name, b"no message")
    return mailbox, names


def calls(action):
    """Calls of functions, built-in ones included, while `action` runs."""
    counted = 0

    def count(frame, event, argument):
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return counted


class CountedList(list):
    """A list that knows how often it was searched, and how often gone through."""

    searched = walked = 0

    def __contains__(self, item):
        CountedList.searched += 1
        return super().__contains__(item)

    def __iter__(self):
        CountedList.walked += 1
        return super().__iter__()


def test_listing_searches_no_list_of_clients(tmp_path):
    mailbox, names = federation(tmp_path, SIZE, SIZE)
    CountedList.searched = CountedList.walked = 0
    assert len(mailbox.list_updates(0, CountedList(names))) == SIZE
    assert CountedList.searched == 0
    assert CountedList.walked == 1


@pytest.mark.parametrize("of", [UpdateRef, Enrolment])
def test_a_look_compares_each_message_and_each_client_a_few_times(tmp_path, monkeypatch, of):
    mailbox, _ = federation(tmp_path, SIZE, SIZE)
    coordinator = Coordinator(mailbox)
    coordinator.close_round()  # refuses them all, and remembers it
    counted, original = [0], of.__eq__

    def counting(self, other):
        counted[0] += 1
        return original(self, other)

    monkeypatch.setattr(of, "__eq__", counting)
    assert not coordinator.ready()
    assert counted[0] <= 4 * SIZE


@pytest.mark.parametrize("staleness", [0, 1])
def test_twice_the_clients_cost_twice_as_much(tmp_path, staleness):
    found = {}
    for clients in (SIZE, 2 * SIZE):
        mailbox, _ = federation(tmp_path / str(clients), clients, clients, max_staleness=staleness)
        coordinator = Coordinator(mailbox)
        coordinator.close_round()
        coordinator.ready()
        found[clients] = calls(coordinator.ready), calls(coordinator.close_round)
    for once, twice in zip(found[SIZE], found[2 * SIZE], strict=True):
        assert twice <= 2.2 * once


def test_closing_a_round_costs_in_proportion(tmp_path):
    """Of clients that were asked by name, with late ones among them."""
    found = {}
    for clients in (20, 40):
        path = tmp_path / str(clients)
        mailbox, names = federation(path, clients, 0)
        for name in names:
            post(mailbox, name, ones(1))
        coordinator = Coordinator(mailbox)
        coordinator.record = dataclasses.replace(coordinator.record, selected=tuple(names))
        coordinator._record.add(coordinator.record)
        found[clients] = calls(coordinator.close_round)
        assert coordinator.record.round == 1
    assert found[40] <= 2.2 * found[20]
    assert SCHEMA.num_params < 1000  # or the codec's work would hide the rest

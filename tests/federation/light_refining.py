"""Federations with two messages a round, whose levels add up without rounding; and clients that send both."""

import torch
from light import LightClient, initial_state, make_spec, pause
from light_updates import SIZE, make_message

from fedfstq_hf.codec import message
from fedfstq_hf.codec.budget import MessageBudget
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.client.participation import MailboxParticipation
from fedfstq_hf.federation.control import Control
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.server.coordinator import Coordinator

PREVIEW, REFINEMENT = 400, 480
REFINED = {"codec": "topk", "refinement_budget": REFINEMENT, "preview_step": 0.5, "error_feedback": 0.0}


class RefiningClient(LightClient):
    """A client with budgets of its own for both messages."""

    def __init__(self, mailbox, client_id, folder, *, preview=PREVIEW, refinement=REFINEMENT):
        super().__init__(mailbox, client_id, folder, max_bytes=preview)
        self.participation = MailboxParticipation(
            mailbox,
            self.session,
            budget=MessageBudget(fixed=preview),
            refinements=MessageBudget(fixed=refinement),
            sleep=pause,
        )

    def step(self):
        """As a client with time to spare: both messages are sent when it returns."""
        happened = super().step()
        self.participation.uplink.background.wait()
        return happened


def clients(mailbox, path, names):
    return [RefiningClient(mailbox, name, path / name) for name in names]


S = 0.5


def federation(path, *, enrolled=None, **changes):
    """Two messages a round, from an adapter of zeros: levels add up without rounding."""
    mailbox = FolderMailbox(path, durable=False)
    settings = {"rounds": 9, "refinement_budget": "1bpp", "preview_step": S, "error_feedback": 0.0, "clip": None}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in initial_state().items()}
    spec = make_spec(**(settings | changes))
    found_federation(mailbox, spec, adapter_file.dump(zeros), b"{}\n", control=Control(clients=enrolled), now=0.0)
    return mailbox


def write(mailbox, client_id, value, round, *, refinement=False, **changes):
    """A message that says `value` for each coordinate; b has three examples, all others one."""
    params = message.REFINEMENT_PARAMS if refinement else {}
    settings = {"num_examples": 3 if client_id == "b" else 1, "params": params, "round": round}
    return make_message(mailbox, client_id, torch.full((SIZE,), float(value)), **(settings | changes))


def previews(mailbox, round, **values):
    for client_id, value in values.items():
        mailbox.post_update(round, client_id, write(mailbox, client_id, value, round))


def refinements(mailbox, round, **values):
    for client_id, value in values.items():
        data = write(mailbox, client_id, value, round, refinement=True)
        mailbox.post_update(round, client_id, data, refinement=True)


def close(coordinator):
    """The level of the adapter of the round that it publishes."""
    assert coordinator.ready()
    assert coordinator.close_round() is not None
    return level(coordinator)


def level(coordinator):
    (value,) = set(coordinator.adapter.tolist())
    return value


def second_round(path, *, expected=1.75, **changes):
    """A federation whose first round said a = 2 and b = 4: a quarter and three quarters of P = 3.5, half of it taken.

    The previews of the second round, P = 0, are there: what changes now is what refinements do.
    """
    mailbox = federation(path, **changes)
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=2, b=4)
    assert close(coordinator) == expected
    previews(mailbox, 1, a=0, b=0)
    return mailbox, coordinator

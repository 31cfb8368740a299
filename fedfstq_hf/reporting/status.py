"""A federation in the terminal: one line per round, and what `fedfstq status` shows."""

from __future__ import annotations

from fedfstq_hf.errors import no_federation
from fedfstq_hf.federation.control import read_control, rules
from fedfstq_hf.federation.envelope import Records
from fedfstq_hf.federation.mailbox.posted_metrics import read_metrics
from fedfstq_hf.federation.mailbox.protocol import SPEC_FILE, Mailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.reporting.units import format_bytes
from fedfstq_hf.text import printable


def describe_round(record: RoundRecord, spec: FederationSpec, rounds: int | None = None) -> str:
    """One line about a published round, and one for each refused update; rounds: in all, the spec's where not given."""
    rounds = rounds or spec.rounds
    if record.round == 0:
        line = f"round 0/{rounds}: initial adapter, {format_bytes(record.adapter_bytes)}"
    else:
        refined = f"{len(record.refinements)} refinements of the round before, " if record.refinements else ""
        line = (
            f"round {record.round}/{rounds}: {len(record.accepted)} updates, "
            f"{refined}{format_bytes(record.uplink_bytes)} up, adapter {record.adapter_sha256[:12]}"
        )
    if record.restored_from is not None:
        line += f", rolled back to round {record.restored_from}"
    named = [("refused", update) for update in record.refused] + [("late", update) for update in record.late]
    others = [f"  {fate} {printable(update.client_id)}: {printable(update.reason)}" for fate, update in named]
    if record.unpublished:
        others.append(f"  no token sensitivities published: {printable(record.unpublished)}")
    clipped = [f"{printable(entry.client_id)} ({entry.scale:.3g}x)" for entry in record.accepted if entry.scale < 1]
    if clipped:
        others.append(f"  clipped {', '.join(clipped)}")
    return "\n".join([line, *others])


def render_status(mailbox: Mailbox) -> str:
    """All rounds of a mailbox, what waits in it, and posted metrics.

    Raises:
        MailboxError: no federation lies there.
    """
    head = mailbox.head()
    if head is None:
        raise no_federation(mailbox.address)
    spec = FederationSpec.from_json(mailbox.read(0, SPEC_FILE))
    control = read_control(mailbox)
    now = rules(spec, control)
    name, model, codec = map(printable, (spec.name, spec.model, spec.method.codec))
    lines = [f"{name}: {model}, codec {codec}, {now.rounds} rounds of {spec.local_steps} local steps"]
    uplink = 0
    measured = read_metrics(mailbox, sorted(control.clients or ()), up_to=head)
    unsigned = "unsigned: " if spec.signatures else ""  # as all metrics are
    records = Records(mailbox, spec)
    for round in range(head + 1):
        record = records(round)
        uplink += record.uplink_bytes
        posted = [
            f"{source} {name} {value:.4f}"
            for source, metrics in measured.get(round, {}).items()
            for name, value in metrics.items()
        ]
        lines.append(
            describe_round(record, spec, now.rounds) + (f"  [{unsigned}{'; '.join(posted)}]" if posted else "")
        )
    lines.append(f"uplink in total: {format_bytes(uplink)}")
    if record.finished:
        lines.append("finished")
    else:
        waiting = mailbox.list_updates(head, None if control.clients is None else sorted(control.clients))
        names = ", ".join(ref.client_id for ref in waiting) or "none"
        if control.clients is not None:
            lines.append(f"enrolled: {', '.join(sorted(control.clients)) or 'nobody'}")
        if record.selected is not None:
            lines.append(f"asked for round {head}: {', '.join(map(printable, record.selected))}")
        if control.paused is not None:
            lines.append(f"paused: {printable(control.paused)}")
        lines.append(f"waiting for {now.min_clients} updates of round {head}; here are {len(waiting)}: {names}")
    return "\n".join(lines)

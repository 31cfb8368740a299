"""Who founds and runs a federation: `fedfstq init | serve | stop | rollback | pause | resume | enrol`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedfstq_hf.cli.options import (
    INTERRUPTED,
    ONE_SHOT,
    OVERRIDABLE,
    MailboxAddress,
    Patience,
    parse_overrides,
    quieten,
)
from fedfstq_hf.errors import ConfigError

if TYPE_CHECKING:
    from fedfstq_hf.federation.control import Control
    from fedfstq_hf.federation.keys import KeyPair
    from fedfstq_hf.federation.mailbox.protocol import Mailbox
    from fedfstq_hf.federation.spec import FederationSpec

app = typer.Typer()

_Key = Annotated[
    Path | None, typer.Option(metavar="KEYFILE", help="Key file that opens sealed messages and signs records.")
]


@app.command(context_settings=OVERRIDABLE)
def init(
    context: typer.Context,
    mailbox: Annotated[str, typer.Argument(help="Address of the new federation: hf://ORG/REPO or a folder.")],
    recipe: Annotated[str, typer.Option(help="Recipe that says model, adapter, training and rounds.")],
    method: Annotated[str, typer.Option(help="Which of the recipe's methods to run.")] = "fstq",
    adapter: Annotated[
        str | None, typer.Option(help="Start from this trained adapter, a folder or ORG/NAME, and its configuration.")
    ] = None,
    base_model_name: Annotated[str | None, typer.Option(help="Hub id of a --model that is a folder here.")] = None,
    clients: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Clients that may take part; anybody who can write if left out.")
    ] = None,
    clients_per_round: Annotated[
        int | None, typer.Option(help="Ask only that many of --clients for an update in each round, drawn by seed.")
    ] = None,
    min_clients: Annotated[
        int | None, typer.Option(help="Updates that close a round; the recipe's clients_per_round if left out.")
    ] = None,
    round_seconds: Annotated[
        float | None, typer.Option(help="Close a round after this time even with fewer updates.")
    ] = None,
    mean_examples: Annotated[
        int | None,
        typer.Option(help="Training examples of a client on average, for methods with budget_by_examples."),
    ] = None,
    max_staleness: Annotated[
        int | None, typer.Option(help="Rounds by which an update may be late and still be used, at a discount.")
    ] = None,
    clip: Annotated[
        float | None,
        typer.Option(help="Scale updates down to that many times the round's median norm; 0 for no limit."),
    ] = None,
    signatures: Annotated[
        bool, typer.Option("--signatures", help="Take only messages signed with a key enrolled for their client.")
    ] = False,
    seal_to: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Seal messages: the coordinator's key file, or its x25519: public key."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="KEYFILE", help="Sign each round's record with this key; clients refuse any other record."
        ),
    ] = None,
    share_saliency: Annotated[
        bool,
        typer.Option("--share-saliency", help="Clients that agree send which tokens matter; published in aggregate."),
    ] = False,
    layout: Annotated[
        str | None, typer.Option(help="On the Hub, where clients write: own (repos), shared (repo) or pull-request.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="On the Hub: repos that everybody can read.")] = False,
    patience: Patience = ONE_SHOT,
) -> None:
    """Found a federation: publish round 0 (adapter and spec) into a mailbox.

    Any key of the recipe can be changed: --rounds 20 --model PATH --training.learning_rate 1e-3
    """
    from fedfstq_hf.recipe import load_recipe

    loaded = load_recipe(recipe, parse_overrides(context.args))
    if method not in loaded.methods:
        raise ConfigError(
            f"The recipe has no method {method!r}; it has {', '.join(loaded.methods)}. Type --method NAME."
        )
    names = None if clients is None else _names(clients)
    box = _new_mailbox(mailbox, layout, public, patience)
    quieten()
    from fedfstq_hf.federation.control import Control, Enrolment
    from fedfstq_hf.federation.founding import found_federation
    from fedfstq_hf.federation.keys import signer
    from fedfstq_hf.reporting.card.federation_card import card_maker
    from fedfstq_hf.reporting.card.markup import is_path
    from fedfstq_hf.running.foundation import check_client_repos, found, make_spec

    check_client_repos(mailbox, () if layout == "shared" else names or ())
    loaded = loaded.for_method(method)
    sealing_key = None if seal_to is None else _public_key(seal_to)
    pair = None if key is None else _founder(key, sealing_key)
    founding = found(loaded, loaded.seeds[0], adapter, base_model_name)
    usual = loaded.federation.clients_per_round if clients_per_round is None else clients_per_round
    count = min(usual, len(names) if names else usual) if min_clients is None else min_clients
    spec = make_spec(
        loaded,
        method,
        founding,
        seed=loaded.seeds[0],
        min_clients=count,
        num_clients=len(names) if names else None,
        mean_examples=mean_examples,
        clients_per_round=clients_per_round,
        round_seconds=round_seconds,
        changes={
            **({} if max_staleness is None else {"max_staleness": max_staleness}),
            **({} if clip is None else {"clip": clip or None}),
        },
        signatures=signatures,
        sealing_key=sealing_key,
        founder_key=None if pair is None else pair.verify_key,
        share_saliency=share_saliency,
    )
    if is_path(spec.model):
        typer.echo(f"Others are given the path {spec.model!r}: type --base-model-name ORG/NAME.", err=True)
    record = found_federation(
        box,
        spec,
        founding.adapter,
        founding.adapter_config,
        control=None if names is None else Control(clients={name: Enrolment() for name in names}),
        card=card_maker(mailbox, description=loaded.description),
        sign=None if pair is None else signer(pair, spec.id),
    )
    typer.echo(
        f"Founded {loaded.name} in {mailbox}: {founding.view.schema.num_params:,} adapter parameters "
        f"({record.adapter_bytes:,} bytes), codec {spec.method.codec}, {spec.rounds} rounds of {spec.local_steps} "
        f"local steps, {spec.min_clients} updates a round."
    )
    typer.echo(_next_steps(mailbox, spec, names))


def _names(clients: str) -> list[str]:
    from fedfstq_hf.federation.storage import checked_name

    names = [checked_name(name.strip()) for name in clients.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"--clients takes distinct names, such as --clients a,b,c; got {clients!r}.")
    return names


def _new_mailbox(address: str, layout: str | None, public: bool, patience: float) -> Mailbox:
    from fedfstq_hf.federation.mailbox.open import open_mailbox

    if public and not address.startswith("hf://"):
        raise ConfigError("--public is for the Hub; who can read a folder is up to its permissions. Leave it out.")
    return open_mailbox(address, create=True, layout=layout, private=not public, patience=patience)


def _public_key(key: str) -> str:
    """The public key itself, or that of the key file."""
    from fedfstq_hf.federation import key_files, keys

    if key.startswith("x25519:") and not Path(key).exists():
        keys.parse_public_key(key, "x25519")
        return key
    return key_files.load_signing_key(key).seal_key


def _founder(key: Path, sealing_key: str | None) -> KeyPair:
    """The keys that sign records; `serve` takes one key file, which must open sealed messages too."""
    from fedfstq_hf.federation import key_files

    pair = key_files.load_signing_key(key)
    if sealing_key not in (None, pair.seal_key):
        raise ConfigError(f"--key and --seal-to are of different key files. Type --seal-to {key} as well.")
    return pair


def _next_steps(mailbox: str, spec: FederationSpec, names: list[str] | None) -> str:
    lines = []
    if spec.signatures:
        who = names[0] if names else "CLIENT"
        lines.append(f"Enrol each client's key: fedfstq enrol {mailbox} {who} --verify-key ed25519:...")
    key = " --key KEYFILE" if (spec.sealing_key, spec.founder_key) != (None, None) else ""
    lines.append(f"Next: fedfstq serve {mailbox}{key}")
    return "\n".join(lines)


@app.command()
def serve(
    mailbox: MailboxAddress,
    once: Annotated[
        bool, typer.Option("--once", help="Close the rounds that are ready, then exit (for cron).")
    ] = False,
    poll_seconds: Annotated[
        float, typer.Option(help="Seconds between two looks at the mailbox; they grow rarer while nothing happens.")
    ] = 2.0,
    key: _Key = None,
    patience: Patience = ONE_SHOT,
) -> None:
    """Coordinate a federation until it ends. Needs neither GPU nor base model; stop and restart it at any time."""
    quieten()
    from fedfstq_hf.reporting.status import describe_round
    from fedfstq_hf.running.serve import make_coordinator
    from fedfstq_hf.text import printable

    coordinator = make_coordinator(mailbox, key_file=key, patience=patience, stays=not once)
    try:
        typer.echo(describe_round(coordinator.record, coordinator.spec, coordinator.rules.rounds))
        last = coordinator.serve(
            poll_seconds=poll_seconds,
            once=once,
            on_round=lambda record: typer.echo(describe_round(record, coordinator.spec, coordinator.rules.rounds)),
        )
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. Go on with: fedfstq serve {mailbox}{f' --key {key}' if key else ''}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if last.finished:
        _say_finished(mailbox)
    elif once and coordinator.paused is not None:
        typer.echo(f"Paused: {printable(coordinator.paused)}. Go on with: fedfstq resume {mailbox}")


@app.command()
def stop(mailbox: MailboxAddress, key: _Key = None) -> None:
    """End a federation now: what has arrived is used, and the round made from it is the last one."""
    quieten()
    from fedfstq_hf.reporting.status import describe_round
    from fedfstq_hf.running.serve import make_coordinator

    coordinator = make_coordinator(mailbox, key_file=key)
    typer.echo(describe_round(coordinator.stop(), coordinator.spec))
    _say_finished(mailbox)


@app.command()
def rollback(
    mailbox: MailboxAddress,
    round: Annotated[int, typer.Argument(help="Round whose adapter to go back to.")],
    key: _Key = None,
) -> None:
    """Publish an earlier round's adapter as the next round; updates that wait are refused, and clients keep them."""
    quieten()
    from fedfstq_hf.reporting.status import describe_round
    from fedfstq_hf.running.serve import make_coordinator

    coordinator = make_coordinator(mailbox, key_file=key, reads_messages=False)
    typer.echo(describe_round(coordinator.rollback(round), coordinator.spec))


def _say_finished(mailbox: str) -> None:
    address = mailbox.removeprefix("hf://")
    typer.echo(f"Finished. Load it with: PeftModel.from_pretrained(base, {address!r})")


@app.command()
def pause(
    mailbox: MailboxAddress,
    reason: Annotated[str, typer.Option(help="Why: clients and `fedfstq status` show it.")] = "",
) -> None:
    """Close no more rounds until `fedfstq resume`. Clients may still send what they are training."""
    from fedfstq_hf.federation import control

    changed = _change(mailbox, lambda present, spec: control.pause(reason)(present))
    typer.echo(f"Paused {mailbox}: {changed.paused}. Go on with: fedfstq resume {mailbox}")


@app.command()
def resume(mailbox: MailboxAddress) -> None:
    """Let rounds be closed again."""
    from fedfstq_hf.federation import control

    _change(mailbox, lambda present, spec: control.resume(present))
    typer.echo(f"{mailbox} goes on.")


@app.command()
def enrol(
    mailbox: MailboxAddress,
    clients: Annotated[list[str], typer.Argument(metavar="CLIENT...", help="Names of clients.")],
    repo: Annotated[str | None, typer.Option(help="Hub repo, ORG/NAME, that its messages are read from.")] = None,
    account: Annotated[str | None, typer.Option(help="Hub account that opens the client's pull request.")] = None,
    verify_key: Annotated[
        str | None, typer.Option(help="The client's ed25519: public key: `fedfstq keys show` prints it.")
    ] = None,
    max_examples: Annotated[int | None, typer.Option(help="Count the client as at most that many examples.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the clients off the list.")] = False,
    close: Annotated[
        bool, typer.Option("--close", help="In an open federation: from now on only clients of the list take part.")
    ] = False,
) -> None:
    """Let clients take part, change what is known of them, or take them off the list.

    An open federation, to which anybody may send, stays open unless you say --close; `fedfstq reopen` undoes that.
    """
    from fedfstq_hf.federation import control

    if close and remove:
        raise ConfigError("--close puts clients on a list, and --remove takes them off: leave one of them out.")
    own = {"repo": repo, "account": account, "verify_key": verify_key}
    fields = {name: value for name, value in {**own, "max_examples": max_examples}.items() if value is not None}
    if remove and fields:
        raise ConfigError(f"--remove takes clients off the list: leave --{next(iter(fields)).replace('_', '-')} out.")
    if given := [name.replace("_", "-") for name, value in own.items() if value is not None and len(clients) > 1]:
        raise ConfigError(f"--{given[0]} is one client's own; enrol {', '.join(clients)} one by one.")

    def change(present: Control, spec: FederationSpec) -> Control:
        if remove:
            return control.dismiss(clients, control.rules(spec, present).min_clients)(present)
        if present.clients is None and not close and not spec.signatures:
            raise ConfigError(
                f"{mailbox} is open: anybody may send who can write there. Type --close to let only "
                f"{', '.join(clients)} and those whom you enrol later take part; all others are refused from then on."
            )
        return control.enrol(clients, **fields)(present)

    enrolled = _change(mailbox, change).clients or {}
    typer.echo(f"Enrolled are now {len(enrolled)}: {', '.join(sorted(enrolled)) or 'none'}. All others are refused.")


@app.command()
def reopen(mailbox: MailboxAddress) -> None:
    """Let anybody take part again who can write to the mailbox; what was enrolled is forgotten."""
    from fedfstq_hf.federation import control

    def change(present: Control, spec: FederationSpec) -> Control:
        if spec.signatures or spec.clients_per_round is not None:
            need = "their keys" if spec.signatures else "names to draw from"
            raise ConfigError(f"This federation needs a list of clients, with {need}; it cannot be open.")
        return control.reopen(present)

    _change(mailbox, change)
    typer.echo(f"{mailbox} is open: anybody may send who can write there.")


@app.command()
def extend(
    mailbox: MailboxAddress,
    rounds: Annotated[int | None, typer.Option(help="Rounds until the federation ends, all together.")] = None,
    min_clients: Annotated[int | None, typer.Option(help="Updates that close a round.")] = None,
    round_seconds: Annotated[
        float | None, typer.Option(help="Close a round after this time even with fewer updates; 0: no deadline.")
    ] = None,
) -> None:
    """Change the number of rounds, and when a round closes, of a federation that goes on.

    Example: fedfstq extend hf://my-org/med-lora --rounds 20
    """
    from fedfstq_hf.federation import control

    given = {"rounds": rounds, "min_clients": min_clients, "round_seconds": round_seconds}
    fields = {name: value for name, value in given.items() if value is not None}
    if not fields:
        raise ConfigError("Say what to change: --rounds 20, --min-clients 3, --round-seconds 600.")
    changed = _change(mailbox, lambda present, spec: control.extend(spec, **fields)(present), head=True)
    typer.echo(f"{mailbox}: {control.describe_rules(changed)}.")
    if rounds is not None:
        typer.echo("Clients that run already stop where they would have stopped: start them again to go on.")


@app.command()
def prune(mailbox: MailboxAddress, keep: Annotated[int, typer.Option(min=1, help="Newest rounds.")] = 10) -> None:
    """Remove the adapters of old rounds from a folder: clients need them no more, only `rollback` does."""
    from fedfstq_hf.running.serve import open_federation

    box, _ = open_federation(mailbox)
    if (remove := getattr(box, "prune", None)) is None:
        raise ConfigError("A repo of the Hub holds the newest adapter alone; earlier ones are in its history.")
    typer.echo(f"Removed {remove(keep):,} bytes. There is no way back to a round before the newest {keep}.")


def _change(address: str, change: Callable[[Control, FederationSpec], Control], *, head: bool = False) -> Control:
    """Change the control file of a federation that is there; head: refuse one that is finished."""
    from fedfstq_hf.federation.control import change_control
    from fedfstq_hf.federation.envelope import Records
    from fedfstq_hf.running.serve import open_federation

    mailbox, spec = open_federation(address)
    newest = mailbox.head() or 0
    if head and Records(mailbox, spec)(newest).finished:
        raise ConfigError(
            f"{address} is finished after round {newest}, and its clients have gone. Found another one from its "
            "adapter."
        )
    return change_control(mailbox, lambda present: change(present, spec))

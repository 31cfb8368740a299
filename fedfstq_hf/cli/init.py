"""`fedfstq init`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedfstq_hf.cli.options import OVERRIDABLE, parse_overrides, quieten
from fedfstq_hf.errors import ConfigError

if TYPE_CHECKING:
    from fedfstq_hf.federation.keys import KeyPair
    from fedfstq_hf.federation.mailbox import Mailbox
    from fedfstq_hf.federation.spec import FederationSpec

app = typer.Typer()


@app.command(context_settings=OVERRIDABLE)
def init(
    context: typer.Context,
    mailbox: Annotated[str, typer.Argument(help="Address of the new federation: hf://ORG/REPO or a folder.")],
    recipe: Annotated[str, typer.Option(help="Recipe that says model, adapter, training and rounds.")],
    method: Annotated[str, typer.Option(help="Which of the recipe's methods to run.")] = "fstq",
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
        int, typer.Option(help="Rounds by which an update may be late and still be used, at a discount.")
    ] = 0,
    clip: Annotated[
        float, typer.Option(help="Scale updates down to that many times the round's median norm; 0 for no limit.")
    ] = 10.0,
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
    box = _new_mailbox(mailbox, layout, public)
    quieten()
    from fedfstq_hf.federation.control import Control, Enrolment
    from fedfstq_hf.federation.founding import found_federation
    from fedfstq_hf.federation.keys import signer
    from fedfstq_hf.reporting.card_maker import card_maker
    from fedfstq_hf.running.foundation import found, make_spec

    loaded = loaded.for_method(method)
    sealing_key = None if seal_to is None else _public_key(seal_to)
    pair = None if key is None else _founder(key, sealing_key)
    founding = found(loaded, loaded.seeds[0])
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
        max_staleness=max_staleness,
        clip=clip or None,
        signatures=signatures,
        sealing_key=sealing_key,
        founder_key=None if pair is None else pair.verify_key,
        share_saliency=share_saliency,
    )
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
        f"({record.adapter_bytes:,} bytes), codec {spec.codec}, {spec.rounds} rounds of {spec.local_steps} local "
        f"steps, {spec.min_clients} updates a round."
    )
    typer.echo(_next_steps(mailbox, spec, names))


def _names(clients: str) -> list[str]:
    from fedfstq_hf.federation.mailbox import checked_name

    names = [checked_name(name.strip()) for name in clients.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"--clients takes distinct names, such as --clients a,b,c; got {clients!r}.")
    return names


def _new_mailbox(address: str, layout: str | None, public: bool) -> Mailbox:
    from fedfstq_hf.federation.mailbox import open_mailbox

    if public and not address.startswith("hf://"):
        raise ConfigError("--public is for the Hub; who can read a folder is up to its permissions. Leave it out.")
    return open_mailbox(address, create=True, layout=layout, private=not public)


def _public_key(key: str) -> str:
    """The public key itself, or that of the key file."""
    from fedfstq_hf.federation import keys

    if key.startswith("x25519:") and not Path(key).exists():
        keys.parse_public_key(key, "x25519")
        return key
    return keys.load_signing_key(key).seal_key


def _founder(key: Path, sealing_key: str | None) -> KeyPair:
    """The keys that sign records; `serve` takes one key file, which must open sealed messages too."""
    from fedfstq_hf.federation import keys

    pair = keys.load_signing_key(key)
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

"""Every exception that the package raises on purpose, in one place.

Each states what was given, what was expected and what to type; catch `FedFSTQError` for all of them.
"""


class FedFSTQError(Exception):
    """Base of all errors of this package."""


class ConfigError(FedFSTQError, ValueError):
    """A setting is unknown, has the wrong type or lies outside its range."""


class BudgetError(ConfigError):
    """An uplink budget cannot be parsed, or is too small for even an empty message."""


class DataError(FedFSTQError, ValueError):
    """A data set cannot be trained on: missing columns, an empty shard, labels that are all masked."""


class AdapterMismatchError(FedFSTQError, ValueError):
    """An adapter's names, shapes, base model or LoRA configuration differ from those of the federation."""


class MessageError(FedFSTQError, ValueError):
    """A packed message is malformed, damaged, or belongs to another round, base or adapter."""


class NonFiniteError(FedFSTQError, ArithmeticError):
    """A loss, gradient or update is NaN or infinite; nothing of it was sent."""


class MailboxError(FedFSTQError):
    """A mailbox cannot be read or written, or holds something that is not a federation."""


class MailboxUnavailableError(MailboxError):
    """The mailbox did not answer, or refused for the moment, for as long as the caller was willing to wait."""


class RoundConflictError(MailboxError):
    """Somebody else published this round first."""


class UpdateConflictError(MailboxError):
    """This client already posted other bytes for this round: the id is probably in use twice."""


class SessionBusyError(FedFSTQError):
    """Another process works in the same client state folder."""


def no_federation(address: str) -> MailboxError:
    """The error for a mailbox in which no round 0 was published."""
    return MailboxError(
        f"{address} holds no federation. Check the address, or make one with `fedfstq init {address} ...`."
    )

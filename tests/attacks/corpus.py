"""A small adapter, valid payloads of every codec for it, and the tools of a hostile client."""

from fedfstq_hf.codec import Schema, codec_names, message
from fedfstq_hf.errors import MessageError
from recipes.benchmarks.fuzz import make_header, make_target, problem_of

CODECS = codec_names()
TARGETS = {name: make_target(name) for name in CODECS}
SCHEMA: Schema = TARGETS["fp32"].schema


def shortest(name):
    """The shortest valid payload of a codec that holds something."""
    return min(TARGETS[name].payloads, key=len)


def resealed(name, payload):
    """A message with a valid digest around any payload at all."""
    return message.pack(make_header(name, SCHEMA), payload)


def outcome(name, payload, schema=SCHEMA):
    """What a reader makes of a resealed payload: "refused", or "decoded" to a sane update. Anything else fails."""
    opened = message.unpack(resealed(name, payload))[1]
    try:
        update = TARGETS[name].codec.decode(opened, schema)
    except MessageError:
        return "refused"
    assert problem_of(update, schema) is None
    return "decoded"

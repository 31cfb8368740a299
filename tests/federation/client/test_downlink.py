"""What a change leads to: the adapter of the file, bit for bit, or an error."""

import dataclasses
import hashlib

import pytest
import torch
from light_sessions import record

from fedfstq_hf.codec import Schema
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.client.downlink import apply_change
from fedfstq_hf.federation.server.publication import pack_change


def test_the_digest_is_of_the_vector_under_its_schema():
    schema = Schema.from_state_dict({"w": torch.zeros(2)})
    values = bytes.fromhex("0000803f000000c0")  # 1 and -2
    expected = hashlib.sha256(b"fedfstq adapter\n" + bytes.fromhex(schema.fingerprint) + values).hexdigest()
    assert schema.digest(torch.tensor([1.0, -2.0])) == expected
    assert Schema.from_state_dict({"v": torch.zeros(2)}).digest(torch.tensor([1.0, -2.0])) != expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_change_gives_what_the_file_would_give(dtype):
    schema = Schema.from_state_dict({"w": torch.zeros(3, dtype=dtype)})
    adapter, change = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1e-3, 0.0, -1e-3])
    published = schema.flatten(schema.unflatten(adapter + change))
    base = dataclasses.replace(record(0), adapter_digest=schema.digest(adapter))
    after = dataclasses.replace(record(1), adapter_digest=schema.digest(published))
    data = pack_change(change, base, schema, 0)
    assert torch.equal(apply_change(data, base, adapter, after, schema), published)
    with pytest.raises(MailboxError, match="starts from another adapter"):
        apply_change(data, after, adapter, after, schema)
    with pytest.raises(MailboxError, match="does not give the adapter"):
        apply_change(data, base, adapter, base, schema)

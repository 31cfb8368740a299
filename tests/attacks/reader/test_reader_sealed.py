"""A sealed federation: what can be read by somebody who reads all of its mailbox and holds no key."""

import pytest
from light_sharing import Joining, take_part
from light_updates import found_enrolled

from fedfstq_hf.codec import message
from fedfstq_hf.errors import MessageError
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.mailbox.protocol import SALIENCY_FILE

BOSS, OTHER = keys.KeyPair(b"\1" * 32), keys.KeyPair(b"\2" * 32)
SEALED = {"rounds": 1, "min_clients": 2, "sealing_key": BOSS.seal_key}
TABLE = b"levels and scores of tokens that only a has"


def test_attachments_are_sealed_to_the_coordinator(tmp_path):
    mailbox = found_enrolled(tmp_path, "ab", **SEALED, share_saliency=True)
    take_part(mailbox, "a", TABLE)
    take_part(mailbox, "b", None)
    sent = mailbox.read_attachment("a", SALIENCY_FILE, max_bytes=10**6)
    assert message.is_sealed(sent)
    assert len(sent) < len(TABLE) + message.MAX_CONTAINER + keys.SEAL_OVERHEAD
    assert not any(TABLE in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(MessageError, match="sealed to another key"):
        keys.unseal(OTHER, sent)
    joining = Joining(mailbox, BOSS)
    joining.close_round()
    assert joining.seen == [TABLE]


def test_a_readable_attachment_is_left_out_of_a_sealed_federation(tmp_path, caplog):
    mailbox = found_enrolled(tmp_path, "ab", **SEALED, share_saliency=True)
    take_part(mailbox, "a", TABLE)
    take_part(mailbox, "b", b"of b")
    mailbox.post_attachment(
        "a", SALIENCY_FILE, keys.unseal(BOSS, mailbox.read_attachment("a", SALIENCY_FILE, max_bytes=10**6))
    )
    joining = Joining(mailbox, BOSS)
    joining.close_round()
    assert joining.seen == [b"of b"]
    assert "It is not sealed" in caplog.text

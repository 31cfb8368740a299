"""From clients' token tables, through a federation, to what an adapter repo publishes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedfstq_hf.codec import message
from fedfstq_hf.errors import DataError
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.generation.saliency import unpack
from fedfstq_hf.generation.shared_saliency import client_saliency, join_saliency
from fedfstq_hf.sensitivity import TokenSensitivity
from tests.federation.light import LightClient, found, run_rounds

VOCAB = 16
CONFIG = SimpleNamespace(model_type="llama", hidden_size=8, num_hidden_layers=2, get_text_config=None)
CONFIG.get_text_config = lambda decoder: CONFIG
MODEL = SimpleNamespace(config=CONFIG)


class Tokenizer:
    def __init__(self, offset: int = 0) -> None:
        self._vocab = {f"t{index + offset}": index for index in range(VOCAB)}

    def get_vocab(self) -> dict[str, int]:
        return self._vocab


def table(ids: list[int], strength: float = 1.0) -> dict[str, torch.Tensor]:
    sensitivity = TokenSensitivity(VOCAB)
    for _ in range(2):
        sensitivity.update(torch.tensor([ids]), torch.tensor([[strength * (1 + i) for i in ids]]))
    return sensitivity.state_dict()


def packed(ids: list[int], tokenizer: Tokenizer | None = None) -> bytes:
    data = client_saliency(table(ids), rho=0.9, tokenizer=tokenizer or Tokenizer(), model=MODEL)
    assert data is not None
    return data


def test_a_client_that_saw_nothing_sends_nothing() -> None:
    empty = TokenSensitivity(VOCAB).state_dict()
    assert client_saliency(empty, rho=0.9, tokenizer=Tokenizer(), model=MODEL) is None


def test_only_ids_that_three_clients_saw_are_published() -> None:
    # 1 is a single client's, 2 and 3 are those of two
    tables = [packed([1, 2, 4, 5]), packed([2, 3, 4, 5]), packed([3, 4, 5]), packed([5])]
    files = join_saliency([(data, 0.25) for data in tables])
    joined = unpack(files["saliency.safetensors"])
    assert torch.nonzero(joined.levels).flatten().tolist() == [4, 5]
    assert torch.isinf(joined.scores()).tolist() == [id not in (4, 5) for id in range(VOCAB)]
    assert joined.base["model_type"] == "llama"
    assert b"def generate" in files["custom_generate/generate.py"]


@pytest.mark.parametrize(
    "others",
    [
        [],
        [(b"rubbish", 0.2)] * 5,
        [(packed([1, 5], Tokenizer(7)), 0.2)],
        [(packed([1, 2]), 0.0)],
    ],
    ids=["alone", "with damaged ones", "with one of another tokenizer", "with one that weighs nothing"],
)
@pytest.mark.parametrize("sharers", [0, 1, 2])
def test_of_fewer_clients_nothing_is_published(sharers: int, others: list[tuple[bytes, float]]) -> None:
    files = [*others, *[(packed([1, 2]), 0.3)] * sharers]
    usable = max(sharers, sum(weight > 0 and data != b"rubbish" for data, weight in others))
    with pytest.raises(
        DataError, match=rf"of {usable} clients are usable, out of {len(files)} that were sent; fewer than 3"
    ):
        join_saliency(files)


def test_damaged_and_foreign_tables_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    good = [(packed([1, 2]), 0.3), (packed([1, 2]), 0.3), (packed([1, 2]), 0.2)]
    bad = [(b"rubbish", 0.2), (packed([1, 5], Tokenizer(7)), 0.2), (packed([1, 5], Tokenizer(7)), 0.2)]
    assert join_saliency(bad + good) == join_saliency(good)
    assert "left out" in caplog.text


class SharingClient(LightClient):
    """A light client that carries a token table and agrees to share it."""

    def __init__(self, mailbox: FolderMailbox, client_id: str, data: bytes | None) -> None:
        super().__init__(mailbox, client_id, None)
        self.calls = 0

        def saliency(carried: dict[str, torch.Tensor]) -> bytes | None:
            self.calls += 1
            assert "momentum" in carried
            return data

        self.participation.uplink.saliency = saliency


@pytest.mark.parametrize("asked", [True, False])
def test_sent_once_if_asked_and_counted_as_uplink(tmp_path, asked: bool) -> None:
    mailbox = found(tmp_path, rounds=2, share_saliency=asked)
    clients = [SharingClient(mailbox, name, packed([1, 2, 3])) for name in "abc"]
    coordinator = Coordinator(mailbox, saliency=join_saliency)
    run_rounds(coordinator, clients)
    assert [client.calls for client in clients] == ([1, 1, 1] if asked else [0, 0, 0])
    assert (mailbox.read_root("saliency.safetensors") is not None) == asked
    assert (mailbox.read_root("custom_generate/generate.py") is not None) == asked
    record = coordinator.record
    sent = list((tmp_path / "attachments").rglob("*.safetensors"))
    assert len(sent) == (3 if asked else 0)
    assert all(message.unpack(path.read_bytes())[1] == packed([1, 2, 3]) for path in sent)
    assert record.attached_bytes == sum(path.stat().st_size for path in sent)
    assert record.uplink_bytes == record.attached_bytes + sum(update.num_bytes for update in record.accepted)
    assert record.unpublished == ""


def test_a_client_that_does_not_agree_sends_nothing(tmp_path) -> None:
    mailbox = found(tmp_path, rounds=1, share_saliency=True)
    run_rounds(Coordinator(mailbox, saliency=join_saliency), [LightClient(mailbox, name, None) for name in "ab"])
    assert not (tmp_path / "attachments").exists()
    assert mailbox.read_root("saliency.safetensors") is None

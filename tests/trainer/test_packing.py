"""Without a mailbox: local training, and its change as one message within a budget."""

import pytest
import torch
from tiny import make_tiny_model
from tiny_federation import make_trainer

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.codec import get_codec, message
from fedfstq_hf.errors import BudgetError, ConfigError


def test_local_training_packs_its_change(tmp_path):
    model = make_tiny_model()
    before = AdapterView(model).read()
    trainer = make_trainer(tmp_path, model=model, codec="fp32", client_id="hospital-a")
    trainer.train()
    header, payload = message.unpack(trainer.pack_update())
    view = trainer.adapter_view
    assert (header.client_id, header.num_examples, header.codec) == ("hospital-a", 7, "fp32")
    assert header.schema == view.schema.fingerprint
    assert header.base == view.schema.digest(before)
    change = get_codec("fp32").decode(payload, view.schema).to_dense()
    assert torch.equal(change, view.read() - before)
    assert change.any()


@pytest.mark.parametrize("budget", ["700B", "2bpp", 1500])
def test_a_packed_change_keeps_its_budget(tmp_path, budget):
    trainer = make_trainer(tmp_path, uplink_budget=budget)
    trainer.train()
    data = trainer.pack_update()
    num_params = trainer.adapter_view.schema.num_params
    assert len(data) <= {"700B": 700, "2bpp": num_params // 4, 1500: 1500}[budget]
    header, payload = message.unpack(data)
    assert get_codec(header.codec).decode(payload, trainer.adapter_view.schema).nnz > 50


def test_packing_before_training_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing to pack yet: call train\(\) first"):
        make_trainer(tmp_path).pack_update()


def test_a_budget_below_the_header_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, uplink_budget=50)
    with pytest.raises(BudgetError, match="raise the uplink budget by at least"):
        trainer.train()


def test_a_second_train_packs_from_where_it_began(tmp_path):
    trainer = make_trainer(tmp_path, codec="fp32")
    trainer.train()
    middle = trainer.adapter_view.read()
    trainer.train()
    _, payload = message.unpack(trainer.pack_update())
    change = get_codec("fp32").decode(payload, trainer.adapter_view.schema).to_dense()
    assert torch.equal(change, trainer.adapter_view.read() - middle)

"""A message without a federation: what local training changed, packed for `pack_update()`."""

from __future__ import annotations

import hashlib

from torch import Tensor

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.codec import CodecContext, get_codec, message, parse_budget
from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.federation import adapter_file


def pack_local(config: FedFSTQConfig, view: AdapterView, start: Tensor, fisher: Tensor, num_examples: int) -> bytes:
    """A message of round 0 from adapter `start` to the one `view` shows, within `config.uplink_budget`.

    Args:
        config: names client, codec and budget.
        view: of the adapter as it is now.
        start: (num_params,) float32, the adapter before training.
        fisher: (num_params,) float32 diagonal.
        num_examples: that were trained on.
    """
    codec = get_codec(config.codec, **config.codec_options)
    header = message.Header(
        round=0,
        client_id=config.client_id,
        num_examples=num_examples,
        base=hashlib.sha256(adapter_file.dump(view.schema.unflatten(start))).hexdigest(),
        schema=view.schema.fingerprint,
        codec=codec.name,
        params={},
    )
    budget = config.uplink_budget
    max_bytes = None if budget is None else parse_budget(budget, view.schema.num_params)
    encoded = codec.encode(
        view.schema.unflatten(view.read() - start),
        view.schema.unflatten(fisher),
        max_bytes=None if max_bytes is None else max_bytes - message.overhead(header, max_bytes),
        context=CodecContext(round=0),
    )
    return message.pack(header, encoded.payload)

"""A client's side of the mailbox, after the checks it passes before its first round; and messages without a mailbox."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from fedfstq_hf.adapter import AdapterView, base_fingerprint, check_same_adapter, check_same_base
from fedfstq_hf.codec import CodecContext, get_codec, message
from fedfstq_hf.codec.budget import check_empty_fits, open_budget, open_refinement_budget
from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.errors import BudgetError, ConfigError, MailboxError
from fedfstq_hf.federation.client.agreement import agree, is_agreed, read_terms, summary
from fedfstq_hf.federation.client.participation import MailboxParticipation
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.key_files import client_signer
from fedfstq_hf.federation.mailbox.open import open_mailbox
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.generation.saliency import tokenizer_fingerprint
from fedfstq_hf.trainer.checkpoint import make_state_folder, state_folder
from fedfstq_hf.trainer.gradient_hooks import probe_state, token_table

logger = logging.getLogger(__name__)

_MANY_EXAMPLES = 10**9  # as many digits as a header may need


def join(
    config: FedFSTQConfig, view: AdapterView, tokenizer: Any, output_dir: str
) -> tuple[MailboxParticipation, FederationSpec]:
    """Open the federation at `config.mailbox` for the client whose adapter `view` shows.

    To call it is to agree to what the mailbox asks, which is logged, and kept in the client's state folder; a mailbox
    that asks something else later is refused.

    Args:
        config: the client's settings, with a mailbox.
        view: of the adapter; it and the base must be the federation's.
        tokenizer: names the token ids where the client shares its sensitivities; None shares nothing.
        output_dir: the client's state lies beside it where `config.state_dir` is not given.

    Raises:
        AdapterMismatchError: another base model or LoRA configuration than the federation's.
        BudgetError: not even an empty message fits into the client's budget.
        ConfigError: a budget for refinements in a federation that has none.
        MailboxError: no federation at the address, or one that asks something else than what was agreed to; or its
            coordinator reads this client's messages elsewhere than where the client writes them, or others could read
            them there.
        SessionBusyError: another process works in this client's state folder.
    """
    address = str(config.mailbox)
    mailbox = open_mailbox(address, client_repo=config.repo)
    terms = read_terms(mailbox, address)
    spec, folder = terms.spec, state_folder(config.state_dir, output_dir)
    mailbox.set_patience(spec.patience)
    if not is_agreed(folder, terms):
        for line in summary(spec, address):
            logger.info("%s", line)
    mine = base_fingerprint(view.model)
    if hasattr(tokenizer, "get_vocab"):
        mine["tokenizer"] = tokenizer_fingerprint(tokenizer)
    check_same_base(mine, spec.base_fingerprint, spec.model)
    check_same_adapter(view.model.peft_config[view.name].to_dict(), terms.adapter_config)
    mailbox.check_client(config.client_id)
    budget = config.uplink_budget if config.uplink_budget is not None else spec.method.uplink_budget
    if config.refinement_budget is not None and spec.method.refinement_budget is None:
        raise ConfigError(f"The federation at {address} has no refinements: leave refinement_budget out.")
    refinements = config.refinement_budget if config.refinement_budget is not None else spec.method.refinement_budget
    make_state_folder(folder)
    session = ClientSession(
        config.client_id,
        spec,
        view.schema,
        folder=folder,
        sign=client_signer(mailbox, spec, config.client_id, config.signing_key),
    )

    def pack_saliency(carried: dict[str, Tensor]) -> bytes | None:
        from fedfstq_hf.generation.shared_saliency import client_saliency

        if tokenizer is None:
            logger.warning("share_saliency needs the tokenizer: pass processing_class=tokenizer. Nothing is shared.")
            return None
        state = token_table(carried)
        if not state:
            return None
        return client_saliency(state, rho=spec.rho, tokenizer=tokenizer, model=view.model, probe=probe_state(carried))

    try:
        agree(folder, terms)
        participation = MailboxParticipation(
            mailbox,
            session,
            budget=open_budget(budget, session.schema.num_params),
            refinements=open_refinement_budget(refinements, session.schema.num_params),
            poll_seconds=config.poll_seconds,
            wait_seconds=config.wait_seconds,
            saliency=pack_saliency if config.share_saliency else None,
        )
    except (BudgetError, MailboxError):
        session.close()
        raise
    return participation, spec


def local_budget(config: FedFSTQConfig, view: AdapterView) -> int | None:
    """Payload bytes of the one message that local training packs; None for no limit.

    Raises:
        BudgetError: not even an empty message fits.
    """
    max_bytes, _ = open_budget(config.uplink_budget, view.schema.num_params).take(0, 1, carried={})
    if max_bytes is None:
        return None
    room = max_bytes - message.overhead(_local_header(config, view, "0" * 64, _MANY_EXAMPLES), max_bytes)
    check_empty_fits(0, room)
    return room


def _local_header(config: FedFSTQConfig, view: AdapterView, base: str, num_examples: int) -> message.Header:
    return message.Header(0, config.client_id, num_examples, base, view.schema.fingerprint, config.codec)


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
    header = _local_header(config, view, view.schema.digest(start), num_examples)
    encoded = codec.encode(
        view.schema.unflatten(view.read() - start),
        view.schema.unflatten(fisher),
        max_bytes=local_budget(config, view),
        context=CodecContext(round=0),
    )
    return message.pack(header, encoded.payload)

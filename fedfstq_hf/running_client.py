"""`fedfstq train`: one client of a federation from a client file, without writing Python."""

from __future__ import annotations

import logging
from pathlib import Path

from fedfstq_hf.client_file import ClientFile
from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.errors import DataError, MailboxError
from fedfstq_hf.federation.mailbox import ADAPTER_CONFIG_FILE, SPEC_FILE, Mailbox, open_mailbox
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.founding import load_base, quiet_arguments, wrap_base
from fedfstq_hf.recipe import build
from fedfstq_hf.trainer import FedFSTQTrainer
from fedfstq_hf.workloads import Collator, DataConfig, load_workload

logger = logging.getLogger(__name__)


def run_client(settings: ClientFile) -> FedFSTQTrainer:
    """Join the federation and take part until it ends; returns the trainer, which holds the final adapter."""
    mailbox = open_mailbox(settings.mailbox)
    if mailbox.head() is None:
        raise MailboxError(
            f"{settings.mailbox} holds no federation. Check `mailbox`, or make one with "
            f"`fedfstq init {settings.mailbox} ...`."
        )
    spec = FederationSpec.from_json(mailbox.read(0, SPEC_FILE))
    trainer = _trainer(settings, mailbox, spec)
    trainer.train()
    for settlement in trainer.settlements:
        logger.info("Round %d: update %s %s", settlement.round, settlement.outcome, settlement.reason)
    return trainer


def _trainer(settings: ClientFile, mailbox: Mailbox, spec: FederationSpec) -> FedFSTQTrainer:
    base, tokenizer = load_base(settings.model or spec.model, settings.dtype)
    model = wrap_base(base, mailbox.read(0, ADAPTER_CONFIG_FILE))
    data = build(DataConfig, {**spec.data, **settings.data}, f"data of client {settings.client_id}")
    examples = load_workload(data, tokenizer, need_test=False).train
    if not examples:
        raise DataError(f"{data.path} holds no training examples for client {settings.client_id!r}.")
    output_dir = settings.output_dir or str(Path("runs") / "clients" / settings.client_id)
    return FedFSTQTrainer(
        model=model,
        args=quiet_arguments(output_dir, **{"disable_tqdm": False, **spec.client_defaults, **settings.training}),
        train_dataset=examples,
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
        federation=FedFSTQConfig(
            mailbox=settings.mailbox,
            client_id=settings.client_id,
            uplink_budget=settings.uplink_budget,
            refinement_budget=settings.refinement_budget,
            signing_key=settings.signing_key,
            share_saliency=settings.share_saliency,
            repo=settings.repo,
            poll_seconds=settings.poll_seconds,
            wait_seconds=settings.wait_seconds,
        ),
    )

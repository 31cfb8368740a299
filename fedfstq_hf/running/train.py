"""`fedfstq train`: one client of a federation from a client file, without writing Python."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import TrainingArguments

from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.errors import DataError
from fedfstq_hf.federation.client.agreement import Terms, agree, is_agreed, read_terms, summary
from fedfstq_hf.federation.mailbox.open import open_mailbox
from fedfstq_hf.federation.mailbox.protocol import ONE_SHOT_SECONDS
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.running.client_file import ClientFile, own_data
from fedfstq_hf.running.foundation import load_base, load_shared_base, quiet_arguments, wrap_base
from fedfstq_hf.text import printable
from fedfstq_hf.trainer.checkpoint import make_state_folder, state_folder
from fedfstq_hf.trainer.trainer import FedFSTQTrainer
from fedfstq_hf.workloads import Collator, DataConfig, load_workload

logger = logging.getLogger(__name__)


def run_client(
    settings: ClientFile,
    *,
    consent: Callable[[Sequence[str]], None] | None = None,
    patience: float = ONE_SHOT_SECONDS,
) -> FedFSTQTrainer:
    """Join the federation and take part until it ends; returns the trainer, which holds the final adapter.

    Args:
        settings: the client's own.
        consent: called with what the client is asked to do, a line for each thing, before anything is loaded, and only
            where this client has not agreed to it before; raises to decline. Without it, calling is agreeing.
        patience: seconds for which a mailbox that does not answer is asked again at the first look.
    """
    mailbox = open_mailbox(settings.mailbox, patience=patience)
    terms = read_terms(mailbox, settings.mailbox)
    data = own_data(terms.spec.data, settings.data, f"data of client {settings.client_id}")
    federation = _federation(settings)
    args = _arguments(settings, terms.spec)
    folder = state_folder(federation.state_dir, args.output_dir)
    if not is_agreed(folder, terms):
        if consent is not None:
            consent(summary(terms.spec, settings.mailbox))
        make_state_folder(folder)
        agree(folder, terms)
    trainer = _trainer(settings, terms, args, federation, data)
    trainer.train()
    for settlement in trainer.settlements:
        logger.info("Round %d: update %s %s", settlement.round, settlement.outcome, printable(settlement.reason))
    return trainer


def _federation(settings: ClientFile) -> FedFSTQConfig:
    return FedFSTQConfig(
        mailbox=settings.mailbox,
        client_id=settings.client_id,
        uplink_budget=settings.uplink_budget,
        refinement_budget=settings.refinement_budget,
        signing_key=settings.signing_key,
        share_saliency=settings.share_saliency,
        repo=settings.repo,
        poll_seconds=settings.poll_seconds,
        wait_seconds=settings.wait_seconds,
    )


def _arguments(settings: ClientFile, spec: FederationSpec) -> TrainingArguments:
    output_dir = settings.output_dir or str(Path("runs") / "clients" / settings.client_id)
    return quiet_arguments(output_dir, **{"disable_tqdm": False, **spec.client_defaults, **settings.training})


def _trainer(
    settings: ClientFile, terms: Terms, args: TrainingArguments, federation: FedFSTQConfig, data: DataConfig
) -> FedFSTQTrainer:
    if settings.model is not None:
        base, tokenizer = load_base(settings.model, settings.dtype)
    else:
        base, tokenizer = load_shared_base(terms.spec.model, settings.dtype)
    model = wrap_base(base, terms.adapter_config_bytes)
    examples = load_workload(data, tokenizer, need_test=False).train
    if not examples:
        raise DataError(f"{data.path} holds no training examples for client {settings.client_id!r}.")
    return FedFSTQTrainer(
        model=model,
        args=args,
        train_dataset=examples,
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
        federation=federation,
    )

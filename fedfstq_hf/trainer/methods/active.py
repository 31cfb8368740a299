"""Which methods a federation's settings switch on for a client's local training."""

from __future__ import annotations

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.methods import LocalSwitches
from fedfstq_hf.trainer.methods.fedbat import FedBAT
from fedfstq_hf.trainer.methods.fedprox import FedProx
from fedfstq_hf.trainer.methods.fedtome import FedToMe
from fedfstq_hf.trainer.methods.hooks import LocalMethod
from fedfstq_hf.trainer.methods.scaffold_client import Scaffold


def active_methods(settings: FedFSTQConfig | FederationSpec, view: AdapterView) -> list[LocalMethod]:
    """The methods of a federation, or of local training by itself, which knows FedProx alone; hooks run in this order.

    SCAFFOLD comes before FedProx: its mean is of gradients without the pull.
    """
    methods: list[LocalMethod] = []
    if isinstance(settings, FederationSpec):
        if settings.method.token_merge_ratio:
            methods.append(FedToMe(view.model, settings.method.token_merge_ratio, settings.method.token_merge_layer))
        if settings.method.learned_binarisation:
            methods.append(
                FedBAT(
                    view,
                    warmup=settings.method.binarisation_warmup,
                    rho=settings.method.binarisation_rho,
                    local_steps=settings.local_steps,
                )
            )
        if settings.method.scaffold:
            methods.append(Scaffold(view))
    switches: LocalSwitches = settings.method if isinstance(settings, FederationSpec) else settings
    if switches.proximal_mu:
        methods.append(FedProx(view, switches.proximal_mu))
    return methods

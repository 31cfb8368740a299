"""Specs from one flat list of settings: those of the method and of training go where they belong."""

import dataclasses
from typing import Any

from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.methods import MethodSettings

METHOD = {item.name for item in dataclasses.fields(MethodSettings)}
TRAINING = {"optimizer_state", "refresh_steps", "rho"}


def flat_spec(**settings: Any) -> FederationSpec:
    """A spec whose method has the switches among `settings`."""
    method = {name: settings.pop(name) for name in METHOD & set(settings)}
    training = {name: settings.pop(name) for name in TRAINING & set(settings)}
    if training:
        settings["training"] = {**settings.get("training", {}), **training}
    return FederationSpec(**settings, method=MethodSettings.from_dict(method))

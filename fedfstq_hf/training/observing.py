"""What a training step gives away: token sensitivity and adapter Fisher, read off its ordinary backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.sensitivity import AdapterFisher, TokenSensitivity

_TOKENS = "tokens."


class StepObserver:
    """Keeps the two Fisher averages of one client.

    Args:
        model: base or PEFT model, for its input embeddings.
        view: of the adapter.
        rho: decay of both averages.
        refresh_steps: token sensitivity is read off at local steps 0, H, 2H, ...

    Attributes:
        fisher: of the adapter's coordinates, from gradients before clipping.
        tokens: per token id.
    """

    def __init__(self, model: nn.Module, view: AdapterView, *, rho: float, refresh_steps: int) -> None:
        self._model, self._view = model, view
        self.rho, self.refresh_steps = rho, refresh_steps
        self.fisher = AdapterFisher(view.parameters, rho=rho)
        self.tokens = self._new_tokens()
        self._seen: list[tuple[Tensor, Tensor]] = []  # ids and g of the step's micro-batches, (tokens,) each

    def begin(self, carried: Mapping[str, Tensor]) -> None:
        """Start a round: a new Fisher average, and the token table that `carried` holds."""
        self.fisher.reset()
        self.tokens = self._new_tokens()
        self._seen = []
        if table := token_table(carried):
            self.tokens.load_state_dict(table)

    def carried(self) -> dict[str, Tensor]:
        """What the next round of this client begins with."""
        return {f"{_TOKENS}{name}": value for name, value in self.tokens.state_dict().items()}

    def watch(self, local_step: int, inputs: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Within it runs one micro-batch, forward and backward, of local step `local_step` (from 0)."""
        if local_step % self.refresh_steps:
            return contextlib.nullcontext()
        return self._token_probe(inputs)

    def end_step(self) -> None:
        """After the last backward pass of an optimizer step, before clipping.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; the average stays as it was.
        """
        self.fisher.update(self._view.gradients())
        self._enter_tokens()

    @contextlib.contextmanager
    def _token_probe(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Within it, the backward pass leaves g(i) = ||dL/de_i||^2 of each input token for the end of the step."""
        mask = inputs.get("attention_mask")

        def watch(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            ids = arguments[0]
            if not output.requires_grad:
                output.requires_grad_()  # a frozen embedding gets no gradient by itself

            def collect(gradient: Tensor) -> None:
                squared = gradient.detach().float().square().sum(dim=-1)
                keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
                self._seen.append((ids[keep], squared[keep]))

            if output.requires_grad and torch.is_grad_enabled():
                output.register_hook(collect)  # type: ignore[no-untyped-call]

        handle = self._model.get_input_embeddings().register_forward_hook(watch)  # type: ignore[operator]
        try:
            yield
        finally:
            handle.remove()

    def _enter_tokens(self) -> None:
        """The micro-batches of one step enter the table as one, however they are cut."""
        if self._seen:
            ids, squared = (torch.cat([part.cpu() for part in parts]) for parts in zip(*self._seen, strict=True))
            self._seen = []
            self.tokens.update(ids, squared)

    def _new_tokens(self) -> TokenSensitivity:
        vocab_size = self._model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        return TokenSensitivity(int(vocab_size), rho=self.rho)


def token_table(carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the `TokenSensitivity` among what a session carries; empty where there is none."""
    return {name.removeprefix(_TOKENS): value for name, value in carried.items() if name.startswith(_TOKENS)}

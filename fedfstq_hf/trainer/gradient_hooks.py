"""What a training step gives away: token sensitivity and adapter Fisher, read off its ordinary backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.errors import NonFiniteError
from fedfstq_hf.sensitivity import AdapterFisher, TokenSensitivity
from fedfstq_hf.sensitivity.fisher import check_finite
from fedfstq_hf.trainer.processes import Processes

if TYPE_CHECKING:
    from fedfstq_hf.generation.probe import ProbeFit

_FISHER = "fisher."
_TOKENS = "tokens."
_PROBE = "probe."


class GradientObserver:
    """Keeps the two Fisher averages of one client, and the fit of its saliency probe.

    Args:
        view: of the adapter, and of its model's input embeddings.
        rho: decay of both averages.
        refresh_steps: token sensitivity is read off at local steps 0, H, 2H, ...
        processes: that train together; each enters the tokens of all.
        own_gradients: the adapter Fisher is of gradients that `take_gradients` is given at refresh steps, not of those
            that the optimizer sees.
        keep_fisher: False where the Fisher information is read elsewhere; gradients are then only checked.
        fit_probe: fit a saliency probe at refresh steps, for a client that shares it.

    Attributes:
        fisher: of the adapter's coordinates, from gradients before clipping.
        tokens: per token id.
        probe: from early hidden states; None where none is fitted.
    """

    def __init__(
        self,
        view: AdapterView,
        *,
        rho: float,
        refresh_steps: int,
        processes: Processes | None = None,
        own_gradients: bool = False,
        keep_fisher: bool = True,
        fit_probe: bool = False,
    ) -> None:
        self._model, self._view, self._processes = view.model, view, processes or Processes()
        self.rho, self.refresh_steps = rho, refresh_steps
        self._own_gradients, self._keep_fisher, self._fit_probe = own_gradients, keep_fisher, fit_probe
        self.fisher = AdapterFisher(view.parameters, rho=rho)
        self.tokens = self._new_tokens()
        self.probe = self._new_probe()
        # of the step's micro-batches: ids, g and the hidden states for the probe, (tokens,), (tokens,), (tokens, H)
        self._seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._taken: list[Tensor | None] = []

    def begin(self, carried: Mapping[str, Tensor] | None) -> None:
        """Start a round: a new Fisher average, and the token table and probe of `carried`; None keeps those here."""
        self.fisher.reset()
        self._seen, self._taken = [], []
        if carried is None:
            return
        self.tokens, self.probe = self._new_tokens(), self._new_probe()
        if table := token_table(carried):
            self.tokens.load_state_dict(table)
        if self.probe is not None and (state := probe_state(carried)):
            self.probe.load_state_dict(state)

    def carried(self) -> dict[str, Tensor]:
        """What the next round of this client begins with."""
        carried = {f"{_TOKENS}{name}": value for name, value in self.tokens.state_dict().items()}
        if self.probe is not None:
            carried |= {f"{_PROBE}{name}": value for name, value in self.probe.state_dict().items()}
        return carried

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as it stands in the middle of a round, on the CPU; nothing of it is rounded."""
        state = {f"{_FISHER}{name}": value for name, value in self.fisher.state_dict().items()}
        state |= self.carried()
        if self.probe is not None:
            state |= {f"{_PROBE}{name}": value for name, value in self.probe.state_dict(torch.float64).items()}
        return {name: value.cpu() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict()` returned; what is not in it stays as it is."""
        for prefix, average in ((_FISHER, self.fisher), (_TOKENS, self.tokens), (_PROBE, self.probe)):
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if own and average is not None:
                average.load_state_dict(own)

    def watch(
        self, local_step: int, inputs: Mapping[str, Any], divisor: Tensor | float
    ) -> contextlib.AbstractContextManager[None]:
        """Within it runs one micro-batch, forward and backward, of local step `local_step` (from 0).

        divisor: what the sum of the loss over target tokens is divided by before the backward pass.
        """
        if local_step % self.refresh_steps:
            return contextlib.nullcontext()
        return self._token_probe(inputs, float(divisor))

    def take_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Add a micro-batch's gradients, in schema order, to those that the Fisher average is of."""
        if not self._taken:
            self._taken = list(gradients)
            return
        pairs = zip(self._taken, gradients, strict=True)
        self._taken = [b if a is None else a if b is None else a + b for a, b in pairs]

    def end_step(self, local_step: int) -> bool:
        """After the last backward pass of an optimizer step, before clipping.

        Returns:
            False if a gradient is NaN or infinite: nothing was taken in, and the step should not count.
        """
        seen, self._seen = self._seen, []
        taken, self._taken = self._taken, []
        gradients = self._view.gradients()
        try:
            if self._own_gradients:
                check_finite(gradients)
                if taken:
                    self.fisher.update(taken)
            elif self._keep_fisher:
                self.fisher.update(gradients)
            else:
                check_finite(gradients)
        except NonFiniteError:
            return False
        if seen:
            self._enter_tokens(seen)
        return True

    def forget_step(self) -> None:
        """The step at hand counts for nothing."""
        self._seen, self._taken = [], []

    def _enter_tokens(self, seen: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """The micro-batches of one step enter table and probe as one, however they are cut."""
        columns = [
            torch.cat([part.cpu() for part in parts if part is not None])
            for parts in zip(*seen, strict=True)
            if parts[0] is not None
        ]
        ids, squared, *hidden = self._processes.joined(*columns) if self._processes.count > 1 else columns
        if not bool(torch.isfinite(squared).all()):  # squares can overflow where the gradients themselves do not
            return
        self.tokens.update(ids, squared)
        if self.probe is not None and hidden:
            self.probe.update(hidden[0], squared, torch.ones_like(ids))

    @contextlib.contextmanager
    def _token_probe(self, inputs: Mapping[str, Any], divisor: float) -> Iterator[None]:
        """Within it, the backward pass leaves g(i) = ||dL/de_i||^2 of each input token for the end of the step.

        L is the sum over target tokens, of which those of the token's own example alone depend on it: g(i) is the same
        whoever shares its batch.
        """
        hidden: list[Tensor] = []

        def watch(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            ids = arguments[0]
            if not output.requires_grad:
                output.requires_grad_()  # a frozen embedding gets no gradient by itself

            def collect(gradient: Tensor) -> None:
                squared = (gradient.detach().float() * divisor).square().sum(dim=-1)
                keep = _real_tokens(ids, inputs)
                self._seen.append((ids[keep], squared[keep], hidden[0][keep] if hidden else None))

            if output.requires_grad and torch.is_grad_enabled():
                output.register_hook(collect)  # type: ignore[no-untyped-call]

        handles = [embedding.register_forward_hook(watch) for embedding in self._embeddings()]
        if self.probe is not None:
            from fedfstq_hf.generation.blocks import block_at, read_block

            ids = inputs["input_ids"]

            def keep_hidden(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if not hidden:  # activation checkpointing comes by a second time
                    hidden.append(read_block(block, args, kwargs, ids, torch.ones_like(ids)).hidden.detach())

            block = block_at(self._model, self.probe.layer)
            handles.append(block.register_forward_pre_hook(keep_hidden, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _embeddings(self) -> list[nn.Module]:
        """The modules that look token ids up: encoder and decoder may each have one, with the same weights."""
        first = self._model.get_input_embeddings()
        alike: list[nn.Module] = [
            module
            for module in self._model.modules()
            if isinstance(module, nn.Embedding) and module.weight is first.weight
        ]
        return alike or [first]

    def _new_tokens(self) -> TokenSensitivity:
        vocab_size = self._model.get_input_embeddings().weight.shape[0]
        return TokenSensitivity(int(vocab_size), rho=self.rho)

    def _new_probe(self) -> ProbeFit | None:
        if not self._fit_probe:
            return None
        from fedfstq_hf.generation.blocks import decoder_blocks
        from fedfstq_hf.generation.probe import ProbeFit

        size = self._model.config.get_text_config(decoder=True).hidden_size
        return ProbeFit(int(size), layer=min(1, len(decoder_blocks(self._model)) - 1))


def _real_tokens(ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Which of the ids that an embedding was given are no padding, bool in their shape.

    The decoder of an encoder-decoder model has a mask of its own. A mask of (batch, heads, queries, keys) lets a token
    see itself where it is none, be it boolean or added to scores.
    """
    given = inputs.get("input_ids")
    own = isinstance(given, Tensor) and ids.shape == given.shape and bool((ids == given.to(ids.device)).all())
    mask = inputs.get("attention_mask" if own else "decoder_attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen = mask.diagonal(dim1=-2, dim2=-1)[:, 0]
        mask = seen if seen.dtype == torch.bool else seen > -1
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return mask.to(ids.device).bool()
    return torch.ones_like(ids, dtype=torch.bool)


def token_table(carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the `TokenSensitivity` among what a session carries; empty where there is none."""
    return {name.removeprefix(_TOKENS): value for name, value in carried.items() if name.startswith(_TOKENS)}


def probe_state(carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the `ProbeFit` among what a session carries; empty where there is none."""
    return {name.removeprefix(_PROBE): value for name, value in carried.items() if name.startswith(_PROBE)}

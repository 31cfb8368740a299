"""TokenReducer: drops the prompt tokens that matter least, before or early in the prefill of `generate()`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.generation.blocks import Kept, base_of
from fedfstq_hf.generation.cache import sliding_window
from fedfstq_hf.generation.inspection import Inspection
from fedfstq_hf.generation.prefill import Choose, Prompt, ReducedModel, gathered
from fedfstq_hf.generation.scorers import QueryAttention, Scorer
from fedfstq_hf.generation.selection import (
    MARKERS,
    Protection,
    Spans,
    budgets,
    check_spans,
    protect_spans,
    select,
    special_ids,
    strip_markers,
    template_sequences,
)

logger = logging.getLogger(__name__)

_LOOPS = {"greedy_search": "_sample", "sample": "_sample", "beam_search": "_beam_search", "beam_sample": "_beam_search"}


class TokenReducer:
    """Keeps the most salient tokens of a prompt, at their original positions. Three ways to use it:

    `model.generate(**inputs, custom_generate=reducer)`: prefill and cache shrink; the result is the whole prompt and
    the new tokens. `reducer.reduce(**inputs)`: shorter inputs for any pipeline. `TokenReductionLogitsProcessor(reducer,
    model)`: only the cache shrinks, after the prefill.

    Args:
        keep_ratio: share of the real tokens to keep, in (0, 1]; 0.5 unless given.
        keep_tokens: number of tokens to keep instead.
        scorer: ranks tokens; `QueryAttention()` unless given.
        tokenizer: names special and chat-template tokens, and is needed by `encode` and `inspect`.
        model: needed by `reduce` and `inspect` if the scorer runs it; generate() passes its own.
        first, last: tokens at the two ends that are always kept.
        min_tokens: shorter prompts pass through unchanged, since scoring would cost more than it saves.
        markers: what encloses text to protect in `encode` and `inspect`.

    Raises:
        ConfigError: a setting out of its range, or a model, cache or mode of generation that tokens cannot be dropped
            from. DataError: a prompt that cannot be reduced.
    """

    def __init__(
        self,
        keep_ratio: float | None = None,
        *,
        keep_tokens: int | None = None,
        scorer: Scorer | None = None,
        tokenizer: Any = None,
        model: Any = None,
        first: int = 4,
        last: int = 8,
        min_tokens: int = 128,
        markers: tuple[str, str] = MARKERS,
    ) -> None:
        if keep_ratio is not None and keep_tokens is not None:
            raise ConfigError(f"got keep_ratio={keep_ratio} and keep_tokens={keep_tokens}; give one of them")
        for name, value in (("keep_ratio", keep_ratio), ("keep_tokens", keep_tokens), ("min_tokens", min_tokens)):
            whole = name != "keep_ratio"
            if value is not None and (isinstance(value, bool) or not isinstance(value, int if whole else (int, float))):
                raise ConfigError(f"{name} is {value!r}; expected a {'whole ' if whole else ''}number")
        if keep_tokens is None and not 0 < (keep_ratio := 0.5 if keep_ratio is None else keep_ratio) <= 1:
            raise ConfigError(f"keep_ratio is {keep_ratio}; expected a share in (0, 1], for example 0.5")
        if keep_tokens is not None and keep_tokens < first + last:
            raise ConfigError(
                f"keep_tokens is {keep_tokens}; the first {first} and the last {last} tokens are always "
                f"kept, so give at least {first + last}"
            )
        self.keep_ratio, self.keep_tokens, self.min_tokens = keep_ratio, keep_tokens, min_tokens
        self.scorer = QueryAttention() if scorer is None else scorer
        self.tokenizer, self.model, self.markers = tokenizer, model, markers
        self._ends = Protection(first, last)
        self._said = False  # that a prompt was too short
        self._sequences = template_sequences(tokenizer)

    def __repr__(self) -> str:
        kept = f"keep_ratio={self.keep_ratio}" if self.keep_tokens is None else f"keep_tokens={self.keep_tokens}"
        return f"TokenReducer({kept}, scorer={type(self.scorer).__name__}, min_tokens={self.min_tokens})"

    @classmethod
    def from_pretrained(cls, repo: str, keep_ratio: float | None = None, **settings: Any) -> TokenReducer:
        """A reducer with the saliency published beside an adapter, from a repo or a folder.

        Without a `saliency.safetensors` there, the query-aware scorer is used alone, and one log line says so.
        settings: as for `TokenReducer`. Raises ConfigError for a saliency file of another tokenizer or base.
        """
        from fedfstq_hf.generation.published import published_scorer, published_tokenizer

        settings["tokenizer"] = settings.get("tokenizer") or published_tokenizer(repo)
        if settings.get("scorer") is None:
            settings["scorer"] = published_scorer(repo, settings["tokenizer"], settings.get("model"))
        return cls(keep_ratio, **settings)

    # ------------------------------------------------------------------ generate(custom_generate=reducer)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        protected: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """What generate() calls: greedy search, sampling and beam search on a shortened prefill.

        protected: (batch, seq) bool from `encode`, passed to generate() as a keyword; true tokens are always kept.
        """
        loop = _LOOPS.get(mode := generation_config.get_generation_mode().value)
        if loop is None:
            raise ConfigError(f"token reduction knows {sorted(_LOOPS)}, not {mode!r}; leave custom_generate out for it")
        dropped = _dropped_by_generate()
        if dropped.get("assistant_model") is not None:
            raise ConfigError("token reduction has no assisted decoding; leave assistant_model or custom_generate out")
        if (streamer := dropped.get("streamer")) is not None:
            if loop != "_sample":
                raise ConfigError(f"a streamer cannot follow {mode!r}; leave num_beams or the streamer out")
            model_kwargs["streamer"] = streamer
        spans = _expanded(protected, input_ids)

        def pays(prompt: Prompt) -> bool:
            if not self._pays(prompt, model, generation_config.max_length):
                return False
            if not model_kwargs.get("use_cache", True) or model_kwargs.get("past_key_values") is None:
                raise ConfigError("token reduction needs the cache; leave use_cache=False out, or custom_generate")
            positions = model_kwargs.get("position_ids")
            if positions is None or positions.ndim != 2:
                raise ConfigError(
                    f"{type(model).__name__} takes no position_ids of (batch, seq): kept tokens would move together "
                    "(ALiBi), or stand in several dimensions. Leave custom_generate out for it"
                )
            return True

        _check_model(model, model_kwargs)
        reduced = ReducedModel(model, self.scorer, self._choose(model), pays, spans)
        try:
            return getattr(type(model), loop)(
                reduced, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
            )
        finally:
            reduced.close()

    # ------------------------------------------------------------------ any pipeline

    def reduce(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        protected: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Tensor]:
        """Shorter `input_ids`, `attention_mask` and `position_ids`, all (B, K), for `model(...)` or `generate(...)`.

        Rows that keep fewer than K are padded on the left, if the prompt was. Exact: the logits are those of the whole
        prompt with the dropped tokens masked. `others` (such as `token_type_ids`) must be absent.
        """
        if "inputs_embeds" in others:
            raise ConfigError("token reduction scores token ids; got inputs_embeds. Pass input_ids")
        if others:
            raise ConfigError(f"reduce() got {sorted(others)}; it takes input_ids, attention_mask and protected")
        prompt = self._prompt(input_ids, attention_mask, protected)
        if self.model is not None:
            _check_model(base_of(self.model), {})
        if self._pays(prompt, None if self.model is None else base_of(self.model), input_ids.shape[1]):
            scores = self.scorer.scores(self.model, prompt.input_ids, prompt.attention_mask)
            prompt = gathered(prompt, self._choose(self.model)(prompt, scores))
        return {
            "input_ids": prompt.input_ids,
            "attention_mask": prompt.attention_mask,
            "position_ids": prompt.position_ids,
        }

    def encode(
        self, texts: str | Sequence[str], protect: Sequence[Spans] | Spans = (), **options: Any
    ) -> dict[str, Any]:
        """Tokenise texts with what to protect: `input_ids`, `attention_mask` and `protected`, all (B, T), left-padded.

        protect: for one text its character spans `(start, end)`, for several a list of such lists. Text between
        `<keep>` and `</keep>` is protected too; the markers are taken out first, so spans count characters without
        them. options go to the tokenizer. All three are accepted by `generate(custom_generate=reducer)` and `reduce`.
        """
        if self.tokenizer is None:
            raise ConfigError("encode() and inspect() need a tokenizer: TokenReducer(tokenizer=tokenizer, ...)")
        many = [texts] if isinstance(texts, str) else list(texts)
        spans: list[Any] = [protect] if isinstance(texts, str) else list(protect) or [()] * len(many)
        if len(spans) != len(many):
            raise DataError(f"got spans for {len(spans)} texts, and {len(many)} texts; give one list of spans for each")
        stripped = [strip_markers(text, self.markers) for text in many]
        settings = {"padding": len(many) > 1, "padding_side": "left", "add_special_tokens": True} | options
        encoded = self.tokenizer(
            [text for text, _ in stripped], return_offsets_mapping=True, return_tensors="pt", **settings
        )
        offsets = encoded["offset_mapping"]
        wanted = [[*marked, *given] for (_, marked), given in zip(stripped, spans, strict=True)]
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "protected": protect_spans(offsets, wanted),
        }

    def inspect(self, text: str, protect: Spans = ()) -> Inspection:
        """What would be kept of a text, with scores: shows itself in a notebook, `print(...)` for a terminal.

        Short texts are reduced here as well, whatever `min_tokens` says.
        """
        inputs = self.encode(text, protect)
        if self.model is not None:
            device = base_of(self.model).device
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        prompt = self._prompt(**inputs)
        scores = self.scorer.scores(self.model, prompt.input_ids, prompt.attention_mask)
        kept = torch.zeros_like(prompt.protected)
        kept.scatter_(1, self._choose(self.model, min_tokens=0)(prompt, scores).positions, True)
        ids = prompt.input_ids[0]
        return Inspection(
            tokens=[self.tokenizer.decode([i]) for i in ids.tolist()],
            kept=kept[0].tolist(),
            protected=(prompt.protected | self._always(prompt, self.model))[0].tolist(),
            scores=scores[0].float().tolist(),
        )

    # ------------------------------------------------------------------ shared

    def kept(self, input_ids: Tensor, attention_mask: Tensor, model: Any = None) -> Kept:
        """What is kept of prompts (B, T); all of it where reduction would not pay."""
        prompt = self._prompt(input_ids, attention_mask, None)
        if not self._pays(prompt, None, input_ids.shape[1]):
            return Kept.all_of(input_ids)
        scores = self.scorer.scores(model, prompt.input_ids, prompt.attention_mask)
        return self._choose(model)(prompt, scores)

    def _prompt(self, input_ids: Tensor, attention_mask: Tensor | None, protected: Tensor | None) -> Prompt:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if input_ids.ndim != 2 or mask.shape != input_ids.shape or not input_ids.numel():
            raise DataError(
                f"input_ids and attention_mask have shapes {tuple(input_ids.shape)} and "
                f"{tuple(mask.shape)}; expected the same (batch, seq), not empty"
            )
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        return Prompt(input_ids, mask, positions, _expanded(protected, input_ids), 0)

    def _pays(self, prompt: Prompt, model: Any, max_length: int) -> bool:
        """Whether to drop anything; raises ConfigError where it would have to be wrong."""
        lengths = prompt.attention_mask.sum(-1)
        if int(lengths.max()) < self.min_tokens:
            if not self._said:
                self._said = True
                logger.warning(
                    "A prompt of %d tokens passes through whole, as all do that have fewer than min_tokens=%d.",
                    int(lengths.max()),
                    self.min_tokens,
                )
            return False
        if bool((self._budgets(prompt, self.min_tokens) >= lengths).all()):
            return False
        if model is None:
            return True
        config = model.config.get_text_config(decoder=True)
        _check_build(model, config, max_length)
        context = getattr(config, "max_position_embeddings", None)
        needed = int(prompt.position_ids.max()) + 1
        if context is not None and needed > context:
            raise ConfigError(
                f"the prompt has {needed} tokens, the model's context is {context}; dropped tokens do not "
                "make room, since kept ones stay at their positions. Shorten the text"
            )
        window = sliding_window(model.config)
        if window is not None and max_length >= window:
            raise ConfigError(
                f"the model has layers that see {window} tokens back, and the text may reach {max_length}; "
                f"which tokens they see would change with what is dropped. Stay below {window} tokens, or "
                "leave the reducer out"
            )
        return True

    def _always(self, prompt: Prompt, model: Any) -> Tensor:
        config = None if model is None else base_of(model).config.get_text_config(decoder=True)
        rule = Protection(self._ends.first, self._ends.last, special_ids(self.tokenizer, config), self._sequences)
        return rule.mask(prompt.input_ids, prompt.attention_mask, at_start=not prompt.seen)

    def _budgets(self, prompt: Prompt, min_tokens: int) -> Tensor:
        return budgets(prompt.attention_mask, self.keep_ratio, self.keep_tokens, min_tokens)

    def _choose(self, model: Any, min_tokens: int | None = None) -> Choose:
        def choose(prompt: Prompt, scores: Tensor) -> Kept:
            always = self._always(prompt, model)
            budget = self._budgets(prompt, self.min_tokens if min_tokens is None else min_tokens)
            check_spans(prompt.protected, always, budget)
            return select(scores, prompt.attention_mask, prompt.protected | always, budget)

        return choose


def _expanded(protected: Tensor | None, input_ids: Tensor) -> Tensor:
    """`protected` for each row that generate() made of a prompt (beams, several results): (rows, T) bool."""
    if protected is None:
        return torch.zeros(input_ids.shape, dtype=torch.bool, device=input_ids.device)
    rows, length = input_ids.shape
    if protected.ndim != 2 or protected.shape[1] != length or rows % protected.shape[0]:
        raise DataError(
            f"protected has shape {tuple(protected.shape)}, input_ids {tuple(input_ids.shape)}; expected one flag for "
            "each token, as encode() returns it"
        )
    return protected.bool().to(input_ids.device).repeat_interleave(rows // protected.shape[0], dim=0)


def _check_build(model: Any, config: Any, max_length: int) -> None:
    """Raise `ConfigError` for a build in which what is kept would depend on what is dropped."""
    if getattr(model, "_is_stateful", False) or {"linear_attention", "mamba"} & set(
        getattr(config, "layer_types", None) or ()
    ):
        raise ConfigError(
            f"{type(model).__name__} has layers without attention, whose state holds every token in its order; dropped "
            "ones cannot be taken out of it. Leave the reducer out"
        )
    if str(getattr(config, "_attn_implementation", "")) == "flex_attention":
        raise ConfigError(
            "token reduction cannot cut the masks of flex_attention; type model.set_attn_implementation('sdpa')"
        )
    if model.training and getattr(model.get_decoder(), "gradient_checkpointing", False):
        raise ConfigError("gradient checkpointing takes the cache away that token reduction cuts; call model.eval()")
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") == "longrope" and original is not None and max_length > original:
        raise ConfigError(
            f"{type(model).__name__} reads a text of more than {original} tokens anew where its cache is shorter, and "
            f"the text may reach {max_length}; a shortened cache would save nothing. Stay below {original} tokens, or "
            "leave the reducer out"
        )


def _check_model(model: Any, model_kwargs: dict[str, Any]) -> None:
    if model.config.is_encoder_decoder:
        raise ConfigError(f"{type(model).__name__} is an encoder-decoder model; token reduction needs a decoder only")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ConfigError("token reduction scores token ids; got inputs_embeds. Pass input_ids")


def _dropped_by_generate() -> dict[str, Any]:
    """What generate() was given and does not hand to a custom function, read from its frame.

    Without it a streamer would get the prompt, then nothing, and a reader of it would wait for ever.
    """
    caller = sys._getframe(2)
    if caller.f_code.co_name != "generate":
        return {}
    return {name: caller.f_locals.get(name) for name in ("streamer", "assistant_model")}

"""`FedFSTQSFTTrainer`: TRL's `SFTTrainer` whose `train()` takes part in a federation. Needs the extra `trl`."""

from __future__ import annotations

from typing import Any

from fedfstq_hf.trainer.trainer import FedFSTQMixin

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(
        f"FedFSTQSFTTrainer builds on TRL, which cannot be imported: {error}. Type: pip install 'fedfstq_hf[trl]'"
    ) from error


class _Float32Adapters(SFTTrainer):  # type: ignore[misc]
    """TRL casts the adapter of a base in 4 or 8 bits to bfloat16, too coarse for small changes; this casts it back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


class FedFSTQSFTTrainer(FedFSTQMixin, _Float32Adapters):
    """`trl.SFTTrainer` with one argument more, `federation`.

    Whatever `SFTConfig` can do to the data happens before the first round: chat templates, prompts with completions,
    packing, `assistant_only_loss`. Rows without a target, which TRL drops, do not count in the client's weight. A
    packed row holds several examples: there the weight is the number of rows that were given, so that clients which
    pack and clients which do not count alike.
    """

    def __init__(self, *args: Any, train_dataset: Any = None, **kwargs: Any) -> None:
        self._rows_given = len(train_dataset) if hasattr(train_dataset, "__len__") else None
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        self._prepared = self.train_dataset

    def _num_examples(self) -> int:
        packed = self.args.packing and self.train_dataset is self._prepared
        if packed and self._rows_given is not None and self.federation.num_examples is None:
            return self._rows_given
        return super()._num_examples()

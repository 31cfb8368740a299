"""Imported once by the server that workers are forked off: all that a worker needs, with libraries' chatter off."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it wherever it is installed

import transformers  # noqa: E402

import fedfstq_hf.running.foundation  # noqa: E402
import fedfstq_hf.simulation.workers  # noqa: E402
import fedfstq_hf.trainer.trainer  # noqa: E402, F401

transformers.utils.logging.set_verbosity_error()

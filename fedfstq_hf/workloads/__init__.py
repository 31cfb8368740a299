"""Data sets as tokenised examples: rows in, prompts and answers out, split and grouped so that nothing leaks."""

from fedfstq_hf.workloads.data_config import FORMATS, DataConfig
from fedfstq_hf.workloads.examples import Collator, Example, collate
from fedfstq_hf.workloads.load import Workload, load_texts, load_workload

__all__ = ["FORMATS", "Collator", "DataConfig", "Example", "Workload", "collate", "load_texts", "load_workload"]

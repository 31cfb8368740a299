"""Scorers by name. Each ranks prompt tokens in its own way; `QueryAttention` is the default."""

from fedfstq_hf.generation.scorers.combined import Combined
from fedfstq_hf.generation.scorers.controls import Random, Rarity, Recency
from fedfstq_hf.generation.scorers.probe import Probe, ProbeFit
from fedfstq_hf.generation.scorers.query import QueryAttention
from fedfstq_hf.generation.scorers.table import TokenTable

__all__ = ["Combined", "Probe", "ProbeFit", "QueryAttention", "Random", "Rarity", "Recency", "TokenTable"]

"""Topics by clustering: hashed TF-IDF, a low-rank projection and spherical k-means, all deterministic.

Coarse on purpose: it gives the Dirichlet split something to skew, without a model and without another dependency.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np

_BUCKETS = 1024
_RANK = 24
_ITERATIONS = 30
_COMMON = 0.25
_WORD = re.compile(r"\w{3,}")


def cluster_topics(documents: Sequence[str | Sequence[str]], num_topics: int, num_fit: int | None = None) -> list[str]:
    """Return a topic name (`topic-0`, ...) for each document, which is text or a list of terms.

    Clusters are found on the first `num_fit` documents (all by default), so that test examples do not shape them.
    """
    num_fit = num_fit or len(documents)
    features = _project(_tf_idf(documents, num_fit), num_fit)
    fit = features[:num_fit]
    centers = _spherical_kmeans(fit, min(num_topics, len(fit)))
    return [f"topic-{index}" for index in np.argmax(features @ centers.T, axis=1)]


def _tf_idf(documents: Sequence[str | Sequence[str]], num_fit: int) -> np.ndarray:
    """Hashed TF-IDF, rows of unit length, shape (documents, buckets)."""
    counts = np.zeros((len(documents), _BUCKETS), dtype=np.float32)
    for row, document in enumerate(documents):
        terms = _WORD.findall(document.lower()) if isinstance(document, str) else document
        for term in terms:
            counts[row, zlib.crc32(term.lower().encode()) % _BUCKETS] += 1
    share = (1 + np.count_nonzero(counts[:num_fit], axis=0)) / (1 + num_fit)
    # What a quarter of the documents share ("Humans", "write a function") says nothing about a topic.
    weights = np.where(share < _COMMON, -np.log(share), 0).astype(np.float32)
    return _unit(np.log1p(counts) * weights)


def _project(features: np.ndarray, num_fit: int) -> np.ndarray:
    """Project on the leading directions of the first `num_fit` rows (latent semantic analysis), rows of unit length."""
    fit = features[:num_fit].astype(np.float64)
    _, vectors = np.linalg.eigh(fit.T @ fit)
    return _unit(features.astype(np.float64) @ vectors[:, -_RANK:])


def _spherical_kmeans(points: np.ndarray, num_clusters: int) -> np.ndarray:
    """Centers (clusters, dim) of unit length; begins with points that are far from each other (k-means++ draws)."""
    rng = np.random.default_rng(0)
    centers = points[[rng.integers(len(points))]]
    while len(centers) < num_clusters:
        distance = np.clip(1 - np.max(points @ centers.T, axis=1), 0, None)
        if distance.sum() <= 1e-9:
            break
        centers = np.vstack([centers, points[rng.choice(len(points), p=distance / distance.sum())]])
    for _ in range(_ITERATIONS):
        nearest = np.argmax(points @ centers.T, axis=1)
        sums = np.zeros_like(centers)
        np.add.at(sums, nearest, points)
        moved = np.where(np.linalg.norm(sums, axis=1, keepdims=True) > 1e-12, _unit(sums), centers)
        if np.allclose(moved, centers, atol=1e-10):
            break
        centers = moved
    return centers


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)

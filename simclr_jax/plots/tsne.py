"""Places of images on a map, by t-SNE of their features."""

import numpy as np

from simclr_jax.evaluation.similarity import nearest

MAPPED = 5_000  # Images that t-SNE places; the others lie beside the most similar one of them.


def places_of(features: np.ndarray) -> np.ndarray:
    """Lays out images so that those with similar features lie together (t-SNE).

    Args:
      features: float32 [n, d], rows of length 1.

    Returns:
      Places, float [n, 2] in [0, 1].
    """
    from sklearn.manifold import TSNE

    count = len(features)
    mapped = np.sort(np.random.default_rng(0).permutation(count)[:MAPPED])
    if len(mapped) < 5 or not np.ptp(features, axis=0).any():  # t-SNE cannot lay them out: a line.
        return np.stack([np.linspace(0, 1, count), np.full(count, 0.5)], axis=1)
    perplexity = min(30, (len(mapped) - 1) / 3)
    embedding = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(features[mapped])
    embedding = (embedding - embedding.min(axis=0)) / np.maximum(np.ptp(embedding, axis=0), 1e-12)
    places = np.empty((count, 2))
    places[mapped] = embedding
    others = np.setdiff1d(np.arange(count), mapped)
    if len(others):
        rows, _ = nearest(features[mapped], 1, features[others])
        noise = 0.004 * np.random.default_rng(0).standard_normal((len(others), 2))
        places[others] = np.clip(embedding[rows[:, 0]] + noise, 0, 1)
    return places

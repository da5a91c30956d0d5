"""Spectra of a small model, with everything that a row of the table may have."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from spectra.spectrum import Spectrum


def matrices(
    seed: int = 0, roles: tuple[str, ...] = ("q_proj", "v_proj"), layers: int = 3, size: int = 24
) -> Iterator[Spectrum]:
    """A matrix per layer and role with random vectors, the later layers stronger."""
    rng = np.random.default_rng(seed)
    for layer in range(layers):
        for role in roles:
            vectors = [np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2)]
            S = np.sort(rng.exponential(0.1 * (1 + layer), size))[::-1]
            yield Spectrum(
                f"model.layers.{layer}.self_attn.{role}.weight", (size, size), S=S, U=vectors[0], Vh=vectors[1].T,
                base_norm=10.0, base_cosine=0.99, noise_edge=0.01, unmoved_share=0.0, method="gram-eigh-f64",
            )  # fmt: skip

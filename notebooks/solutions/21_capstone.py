"""Solutions of notebooks/21_capstone.ipynb, and likely mistakes that its checks must refuse."""

import json
from pathlib import Path

import numpy as np

import pace_nb
from pace_nb.kernels.norm import rms_norm_ref
from pace_nb.kernels.rope import rope_ref

CONFIG = json.loads((Path(pace_nb.__file__).parent / "demo" / "config.json").read_text())
D, EPS = CONFIG["head_dim"], CONFIG["rms_norm_eps"]
ANGLE = np.outer(np.arange(1024), CONFIG["rope_theta"] ** (-np.arange(0, D, 2) / D))
COS, SIN = np.cos(ANGLE).astype(np.float32), np.sin(ANGLE).astype(np.float32)


def normed_and_rotated(q, k, q_weight, k_weight, positions):
    q, k = rms_norm_ref(q, q_weight, EPS), rms_norm_ref(k, k_weight, EPS)
    return rope_ref(q, positions, COS, SIN), rope_ref(k, positions, COS, SIN)


def normed_and_rotated_wrong(q, k, q_weight, k_weight, positions):
    """Rotated first."""
    q, k = rope_ref(q, positions, COS, SIN), rope_ref(k, positions, COS, SIN)
    return rms_norm_ref(q, q_weight, EPS), rms_norm_ref(k, k_weight, EPS)


def normed_and_rotated_wrong_2(q, k, q_weight, k_weight, positions):
    """All heads of a token together."""
    q = (rms_norm_ref(q.reshape(len(q), -1), 1.0, EPS)).reshape(q.shape) * q_weight
    k = (rms_norm_ref(k.reshape(len(k), -1), 1.0, EPS)).reshape(k.shape) * k_weight
    return rope_ref(q, positions, COS, SIN), rope_ref(k, positions, COS, SIN)


def attend_one(q, k, v):
    group = len(q) // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("hd,shd->hs", q, k) * q.shape[1] ** -0.5
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", p / p.sum(axis=1, keepdims=True), v)


def attend_one_wrong(q, k, v):
    """Key heads in turn instead of in groups."""
    group = len(q) // k.shape[1]
    k, v = np.tile(k, (1, group, 1)), np.tile(v, (1, group, 1))
    scores = np.einsum("hd,shd->hs", q, k) * q.shape[1] ** -0.5
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", p / p.sum(axis=1, keepdims=True), v)


def attend_one_wrong_2(q, k, v):
    """No scale."""
    return attend_one(q * q.shape[1] ** 0.5, k, v)


def kept(guesses, said):
    num_right = 0
    while num_right < len(guesses) and guesses[num_right] == said[num_right]:
        num_right += 1
    return said[: num_right + 1]


def kept_wrong(guesses, said):
    """Without the token after the last right guess."""
    return kept(guesses, said)[:-1]


def kept_wrong_2(guesses, said):
    """A guess counts though one before it was wrong."""
    return [s for g, s in zip(guesses, said, strict=False) if g == s] + said[-1:]


def kept_wrong_3(guesses, said):
    """All that the model says."""
    return said

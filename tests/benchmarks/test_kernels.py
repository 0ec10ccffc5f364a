"""Every product of a model is found, once, and each row counts the bytes and FLOPs of its shape."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.benchmarks import kernels
from pace_nb.models.hub import DEMO_MODEL
from pace_nb.models.loader import Checkpoint
from pace_nb.models.registry import load_model


@pytest.fixture(scope="module")
def model():
    with Checkpoint.open(DEMO_MODEL) as checkpoint:
        return load_model(checkpoint, "bfloat16")


@pytest.fixture
def asked(monkeypatch):
    """The rows without timing: each run is called once, and what was claimed about it is kept."""
    found = []

    def against(unit):
        def row(case, run, amount, *rest, flops=None, moved=None, **options):
            run()
            found.append((case, amount, unit, rest))
            return {"case": case, "amount": amount, "unit": unit, "flops": flops, "moved": moved}

        return row

    monkeypatch.setattr(kernels, "against_read", against("GB/s"))
    monkeypatch.setattr(kernels, "against_peak", against("GFLOP/s"))
    monkeypatch.setattr(kernels, "against_copy", against("GB/s"))
    return found


def test_products_are_all_matrices_of_the_checkpoint(model):
    """The demo model is tied: its embedding is the head."""
    counted = sum(n * k * len(group) for (n, k), group in kernels.products(model).items())
    with Checkpoint.open(DEMO_MODEL) as checkpoint:
        shapes = [checkpoint.shape(name) for name in checkpoint.names()]
    assert counted == sum(int(np.prod(shape)) for shape in shapes if len(shape) == 2)


def test_an_untied_model_has_its_head_and_not_its_embedding():
    from pace_nb.models.registry import build_model

    with Checkpoint.open(DEMO_MODEL) as checkpoint:
        config, names = dict(checkpoint.config), [*checkpoint.names(), "lm_head.weight"]
    config["tie_word_embeddings"] = False
    found = kernels.products(build_model(config, names))
    names = [name for group in found.values() for name, _ in group]
    assert "lm_head" in names and not [name for name in names if "embed" in name]


def test_few_rows_read_every_layers_weight_and_many_rows_one(model, asked):
    rows = list(kernels.gemm_rows(model, np.dtype(np.uint16)))
    products = kernels.products(model)
    assert len(rows) == 4 * len(products)
    (n, k), group = next(iter(products.items()))
    few, many = rows[1], rows[3]
    assert "M=8 " in few["case"] and few["case"].endswith(f"{len(group)} of them")
    assert few["amount"] == 2 * n * k * len(group)
    assert many["amount"] == 2 * 1024 * n * k and many["unit"] == "GFLOP/s"


def test_attention_counts_keys_values_and_unmasked_scores(asked):
    dtype = np.dtype(np.uint16)
    row = kernels.attention_row(4, 2, 16, dtype, 3, 32)
    assert row["amount"] == 2 * 3 * 32 * 2 * 16 * 2  # K and V, of 3 sequences, 2 bytes each
    row = kernels.prefill_row(4, 2, 16, dtype, 48)
    assert row["amount"] == 4 * 4 * 16 * (48 * 49 / 2)


def test_the_norm_counts_the_streams_it_reads_and_writes(asked):
    row = kernels.norm_row(64, np.dtype(np.uint16))
    assert row["amount"] == 1024 * 64 * (4 + 4 + 4 + 2)


def test_rows_cover_every_kind(asked, monkeypatch):
    monkeypatch.setattr(kernels, "CONTEXT", 64)
    cases = [row["case"] for row in kernels.rows(DEMO_MODEL, "bfloat16")]
    for kind in ("gemm", "attention decode B=1", "attention decode B=8", "attention prefill"):
        assert any(case.startswith(kind) for case in cases), kind
    assert cases[-1].startswith("add_rms_norm")

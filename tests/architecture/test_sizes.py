"""What is committed stays small: goldens, the bundled model, notebooks."""

from __future__ import annotations

KB, MB = 1000, 1000_000


def too_large(paths, most):
    return [
        f"{p}: {p.stat().st_size} bytes, at most {most}" for p in paths if p.stat().st_size > most
    ]


def test_goldens(repository):
    goldens = [p for p in (repository / "tests" / "golden").rglob("*") if p.is_file()]
    assert goldens
    assert not (large := too_large(goldens, 200 * KB)), "\n".join(large)


def test_the_bundled_model(repository):
    weights = sorted((repository / "pace_nb" / "demo").rglob("*.safetensors"))
    assert weights
    assert not (large := too_large(weights, 6 * MB)), "\n".join(large)


def test_the_bundled_draft(repository):
    weights = repository / "pace_nb" / "demo" / "draft" / "model.safetensors"
    assert not (large := too_large([weights], 2 * MB)), "\n".join(large)


def test_notebooks(repository):
    notebooks = sorted((repository / "notebooks").glob("*.ipynb"))
    assert not (large := too_large(notebooks, 2 * MB)), "\n".join(large)

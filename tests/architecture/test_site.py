"""The documentation site: its nav, its links and its pages of notebooks (docs/site/hook.py).

MkDocs itself is in the extra `docs`; `make docs` builds the site with it, strictly.
"""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import yaml


@pytest.fixture(scope="module")
def hook(repository):
    spec = importlib.util.spec_from_file_location("hook", repository / "docs" / "site" / "hook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(repository):
    return yaml.safe_load((repository / "mkdocs.yml").read_text())


def pages(nav):
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages(value) if isinstance(value, list) else [value]


@pytest.fixture(scope="module")
def nav(hook, settings):
    return list(pages(hook.expanded(settings["nav"])))


def origin(page, repository):
    """The file of the repository that a page of the site is made from."""
    if page == "index.md":
        return repository / "README.md"
    if page == "notebooks/index.md":
        return repository / "notebooks"
    if page.startswith("api/kernels/"):
        return repository / "pace_nb" / "kernels" / page.split("/")[-1].replace(".md", ".py")
    if page.startswith("notebooks/"):
        return repository / page.replace(".md", ".ipynb")
    if page.startswith("repo/"):
        return repository / page.removeprefix("repo/")
    return repository / "docs" / page


def test_the_nav_names_what_exists(nav, repository):
    assert not [page for page in nav if not origin(page, repository).exists()]
    assert len(nav) == len(set(nav)), "a page is there twice"


def test_everything_is_in_the_nav(nav, repository, hook):
    documents = [p for p in (repository / "docs").rglob("*.md") if "monitoring" not in p.parts]
    notebooks = list((repository / "notebooks").glob("*.ipynb"))
    kernels = [p for p in (repository / "pace_nb" / "kernels").glob("*.py") if p.stem[0] != "_"]
    assert len(list((repository / "docs" / "adr").glob("0*.md"))) >= 16 and notebooks and kernels
    wanted = {hook.site_path(p) for p in documents + notebooks}
    wanted |= {f"api/kernels/{p.stem}.md" for p in kernels}
    assert not wanted - set(nav)


def test_the_hook_is_named_and_nothing_comes_from_elsewhere(settings, repository):
    for path in settings["hooks"]:
        assert (repository / path).is_file()
    for path in settings["extra_css"]:
        assert "http" not in (repository / "docs" / path).read_text()
    assert settings["theme"]["font"] is False and "extra_javascript" not in settings
    assert {p["scheme"] for p in settings["theme"]["palette"]} == {"default", "slate"}
    assert "/site/" in (repository / ".gitignore").read_text().split()


@pytest.mark.parametrize(
    ("path", "page"),
    [
        ("README.md", "index.md"),
        ("docs/glossary.md", "glossary.md"),
        ("docs/adr", "adr/README.md"),
        ("CONTRIBUTING.md", "repo/CONTRIBUTING.md"),
        ("notebooks/03_gemm_ladder.ipynb", "notebooks/03_gemm_ladder.md"),
        ("notebooks", "notebooks/index.md"),
        ("pace_nb/kernels", "repo/pace_nb/kernels/README.md"),
        ("pace_nb/llm.py", "source/pace_nb/llm.py.md"),
        ("bench/results", "source/bench/results/index.md"),
    ],
)
def test_where_a_file_is_in_the_site(path, page, hook, repository):
    assert hook.site_path(repository / path) == page


def test_links_lead_to_pages_of_the_site(hook, repository):
    text = "[a](../pace_nb/llm.py) [b](adr/0001-no-torch.md#why) [c](https://x.org) [d](#here)\n"
    text += "```\n[e](../README.md)\n```\n[`f`](../README.md)"
    found = hook.relinked(text, repository / "docs" / "architecture.md")
    assert found == (
        "[a](source/pace_nb/llm.py.md) [b](adr/0001-no-torch.md#why) [c](https://x.org) "
        "[d](#here)\n```\n[e](../README.md)\n```\n[`f`](index.md)"
    )
    home = hook.relinked("[a](docs/LOG.md) [b](notebooks/)", repository / "README.md")
    assert home == "[a](LOG.md) [b](notebooks/index.md)"


def test_a_page_of_a_notebook_has_its_cells_outputs_and_pictures(hook, repository):
    for path in sorted((repository / "notebooks").glob("*.ipynb")):
        page, pictures = hook.notebook(path)
        cells = json.loads(path.read_text())["cells"]
        described = [
            output["metadata"]["image/png"]["alt"]
            for cell in cells
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        assert len(pictures) == len(described) == page.count('<p class="picture">')
        shown = re.findall(r'<img src="[^"]+" alt="([^"]*)"', page)
        assert [hook.html.unescape(text) for text in shown] == described
        for cell in cells:
            if cell["cell_type"] == "code":
                assert "".join(cell["source"]).rstrip() in page
        assert hook.title(path).startswith(path.name[:2])


def test_a_kernel_leads_to_its_notebooks(hook):
    page = hook.kernel_page("gemm")
    assert "(../../notebooks/03_gemm_ladder.md)" in page and "::: pace_nb.kernels.gemm" in page
    assert "(../../source/pace_nb/kernels/gemm.py.md)" in page
    assert "Explained in" not in hook.kernel_page("arrays")


def test_code_is_fenced_by_more_ticks_than_it_holds(hook):
    assert hook.fenced("a\n```\nb", "text") == "```` text\na\n```\nb\n````"
    assert hook.fenced("a", "text", "output") == "``` { .text .output }\na\n```"


def test_markdown_of_jupyter_becomes_that_of_the_site(hook):
    assert hook.spaced("one:\n- a\n- b") == "one:\n\n- a\n- b"
    assert hook.spaced("one:\n| a | b |\n|---|---|") == "one:\n\n| a | b |\n|---|---|"
    assert hook.spaced("- a\n- b\n  c") == "- a\n- b\n  c"
    assert 'markdown="1"' in hook.spaced("<details><summary>Hint</summary>\n\nx</details>")
    code = "```\na\n- b\n```"
    assert hook.outside_code(code, hook.spaced) == code


def test_pictures_are_described_in_the_markup(hook, repository):
    page, _ = hook.notebook(repository / "notebooks" / "90_kernel_lab.ipynb")
    assert 'alt=""' not in page and 'width="860"' in page

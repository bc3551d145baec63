"""Documentation, make targets, continuous integration and hooks agree with one another."""

import json
import pathlib
import re

import pytest

import soul
import soul_kernels
from tests.support.layouts import marks, measured, of_several_processes, that_count, with_tables

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench/README.md", *ROOT.glob("soul/**/*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def headings(path):
    """Return the anchors of a page, as a git host makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for name, anchor in LINK.findall(text):
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {name}"
        assert not anchor or anchor in headings(target), f"{page.name}: {name}#{anchor}"


def test_the_table_of_layouts_is_made_of_the_tests():
    page = ROOT / "docs" / "layouts.md"
    assert with_tables(page.read_text()) == page.read_text(), "python -m tests.support.layouts docs/layouts.md"


def test_each_test_of_several_processes_has_measured_how_far_it_is_from_one():
    """Of a test that is new or gone: `make parity`, or pytest --slow --parity with its file, and then the command above."""
    entries = measured()
    covering, counting = of_several_processes(marks()), that_count()
    assert sorted(entries) == sorted({*covering, *counting})
    assert all(entries[test]["measured"] for test in covering) and all(entries[test]["bytes"] for test in counting)
    assert all(one["error"] <= one["limit"] for entry in entries.values() for one in entry["measured"])


def test_a_mark_of_a_layout_that_does_not_exist_is_an_error(tmp_path):
    (tmp_path / "test_one.py").write_text("@pytest.mark.covers('x', 'FSDP3')\ndef test_x(): ...\n")
    with pytest.raises(ValueError, match="test_x: pytest.mark.covers.*FSDP3.*; layouts: one process, FSDP2"):
        marks(tmp_path)


def test_the_reference_has_every_public_name():
    """Every exported name is documented, and every documented one exported."""
    text = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    entries = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    ops = {name for name in soul_kernels.__all__ if f"soul_kernels.{name}.{name}" in entries}  # function and module of one name
    documented = {name.rpartition(".")[2] for name in entries if name.startswith("soul_kernels.")}
    assert ops and documented == set(soul_kernels.__all__)
    documented = {name.removeprefix("soul.") for name in entries if name.count(".") == 1 and name.startswith("soul.")}
    assert documented >= set(soul.__all__) - {"__version__"}


def test_continuous_integration_calls_make_targets_that_exist():
    yaml = pytest.importorskip("yaml", reason="the extra hf is not installed")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    called = set()
    for job in jobs.values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            command, *words = step.get("run", "").split(maxsplit=1) or [""]
            if not command:
                continue
            assert command == "make", step
            called |= set(matrix["target"]) if "matrix.target" in words[0] else {words[0].split()[0]}
    assert called >= {"lint", "docs", "dist", "test", "test-ptx", "test-compile"} and called <= targets, called - targets


def test_one_version_of_the_linter():
    versions = set()
    for name in ("setup.py", ".pre-commit-config.yaml"):
        versions |= set(re.findall(r"ruff==([\d.]+)", (ROOT / name).read_text()))
    assert len(versions) == 1


def test_the_citation_has_the_version_and_the_licence():
    yaml = pytest.importorskip("yaml", reason="the extra hf is not installed")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == soul_kernels.__version__ and citation["license"] == "MIT"
    assert {"arXiv:2404.18239", "arXiv:2305.14342"} <= set(re.findall(r"arXiv:[\d.]+", json.dumps(citation)))

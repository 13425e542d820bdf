"""README is short, links lead somewhere, and every promise names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "RESULTS.md", "launch/README.md", "benchmarks/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
]
PROSE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)  # everything but this


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", PROSE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []


def test_every_promise_names_a_test():
    page = (ROOT / "docs" / "promises.md").read_text()
    promises = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(promises) > 20
    assert [promise for promise in promises if not named_tests(promise)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_named_test_exists(page):
    for file, test in named_tests((ROOT / page).read_text()):
        assert re.search(rf"^def {test or 'test_'}", (ROOT / file).read_text(), re.M), (file, test)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    prose = PROSE.sub("", (ROOT / page).read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"\w+:", link):  # https:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_the_documentation_is_linked_from_readme():
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in readme

"""Files that other tools read: the workflow, the hooks of pre-commit, and the links between pages."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from test_docs import PAGES, ROOT

import datafree

WORKFLOW = ".github/workflows/ci.yml"
HOOKS = ".pre-commit-config.yaml"


def read(name):
    """A YAML file, as texts: to YAML, `on` is true and `3.10` is 3.1."""
    return yaml.load((ROOT / name).read_text(), Loader=yaml.BaseLoader)


def test_the_workflow_runs_scripts_that_exist_on_pythons_that_are_supported():
    jobs = read(WORKFLOW)["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert "bash .ci/run" in commands and "bash scripts/test.sh" in commands
    for command in commands:
        runner, script, *_ = shlex.split(command)
        assert runner == "bash" and (ROOT / script).is_file()
    used = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in used)
    pythons = jobs["quick-tests"]["strategy"]["matrix"]["python"]
    assert pythons[0] == re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert set(read(WORKFLOW)["on"]) == {"push", "pull_request"}


def test_citation_and_changelog_are_of_this_version():
    cited, log = read("CITATION.cff"), (ROOT / "CHANGELOG.md").read_text()
    assert cited["version"] == datafree.__version__ and f"\n## {datafree.__version__}" in log
    assert cited["cff-version"] == "1.2.0" and {"title", "message", "authors", "license"} <= cited.keys()
    assert cited["preferred-citation"]["title"] in " ".join((ROOT / "README.md").read_text().split())


def test_the_hooks_run_what_the_checks_run():
    [local] = read(HOOKS)["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    checks = (ROOT / "scripts" / "check.sh").read_text().splitlines()
    assert local["repo"] == "local" and len(entries) == 3
    for entry in entries:
        assert any(line in (entry, f"{entry} .") for line in checks), entry
        assert shutil.which(entry.split()[0])
    assert all(hook["language"] == "system" and hook["id"] and hook["name"] for hook in local["hooks"])


def slugs(page):
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file_and_a_heading_that_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        place = Path(page.parent, file) if file else page
        assert place.exists(), target
        assert not heading or heading in slugs(place), target


def test_the_index_lists_every_page():
    linked = set(re.findall(r"\]\(([^)]+)\)", (ROOT / "docs" / "README.md").read_text()))
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")} - {"README.md"}
    assert pages <= linked

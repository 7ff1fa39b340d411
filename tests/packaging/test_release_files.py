"""Files that people and indexes read about a release agree with the package."""

from __future__ import annotations

import pytest
import yaml

import unimoe_jax

pytestmark = pytest.mark.fast


def test_the_citation_names_this_version(root):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["version"] == unimoe_jax.__version__
    papers = {entry["url"] for entry in citation["references"]}
    assert papers == {f"https://arxiv.org/abs/{number}" for number in ("2405.11273", "2405.05949")}


def test_the_changelog_has_a_section_for_this_version(root):
    lines = (root / "CHANGELOG.md").read_text().splitlines()
    assert "## [Unreleased]" in lines
    assert any(line.startswith(f"## [{unimoe_jax.__version__}]") for line in lines)


def test_the_pre_commit_hooks_need_no_network(root):
    """Each hook is local and runs the installed ruff, whose version the constraints pin."""
    config = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert all(hook["language"] == "system" for hook in hooks)
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]

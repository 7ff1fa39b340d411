"""Versions, devices and git commit, as env.json records them."""

import json
import subprocess

import numpy as np

from unimoe_jax.runtime.environment import env_info, git_commit
from unimoe_jax.runtime.files import write_json_atomic


def test_env_info_is_json_and_names_the_essentials(tmp_path):
    info = env_info()
    write_json_atomic(tmp_path / "env.json", info)
    read = json.loads((tmp_path / "env.json").read_text())
    assert read["packages"]["jax"] and read["packages"]["numpy"] == np.__version__
    assert read["backend"] in read["devices"] or sum(read["devices"].values()) >= 1
    assert read["python"] and read["platform"] and read["command"]


def test_git_commit_is_of_the_checkout_that_tracks_the_folder(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True
        )

    assert git_commit(tmp_path) is None
    git("init")
    for folder in ("package", "site"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1\n")
    git("add", "package")
    git("commit", "-m", "one")
    commit = git_commit(tmp_path / "package")
    assert commit and len(commit) == 40
    (tmp_path / "package" / "a.py").write_text("2\n")
    assert git_commit(tmp_path / "package") == f"{commit}+changes"
    assert git_commit(tmp_path / "site") is None

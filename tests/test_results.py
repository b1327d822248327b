"""Result files say which tree made them."""

import shutil
import subprocess

import pytest

from benchmarks import result as results

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(tree, *command):
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    done = subprocess.run(["git", *who, *command], cwd=tree, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.fixture
def tree(tmp_path):
    """A checkout with one commit."""
    for name in ("qtk/a.py", "benchmarks/results/x.json", "benchmarks/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "First")
    return tmp_path.resolve()


def test_a_clean_tree_is_its_commit_and_results_do_not_change_that(tree):
    head = git(tree, "rev-parse", "--short", "HEAD")
    assert results.commit_of(tree) == head
    (tree / "benchmarks" / "results" / "x.json").write_text("2\n")
    (tree / "benchmarks" / "results" / "y.json").write_text("2\n")
    (tree / "benchmarks" / "README.md").write_text("2\n")
    assert results.commit_of(tree) == head


@pytest.mark.parametrize("name", ["qtk/a.py", "qtk/new.py"])
def test_changed_code_makes_a_tree_dirty(tree, name):
    (tree / name).write_text("2\n")
    assert results.commit_of(tree) == git(tree, "rev-parse", "--short", "HEAD") + "-dirty"


def test_a_copy_without_its_history_has_no_commit(tree, tmp_path_factory):
    assert results.commit_of(tree / "qtk") == "unknown"  # the repository around it is another
    assert results.commit_of(tmp_path_factory.mktemp("copy").resolve()) == "unknown"


def test_rows_that_are_kept_keep_their_commit_and_versions(monkeypatch):
    monkeypatch.setattr(results, "COMMIT", "bbb")
    made = results.result("T", ["a"], [["1"]], "N", versions={"torch": "2.1"})
    assert made["commit"] == "bbb" and made["versions"] == {"torch": "2.1"}
    old = {"commit": "aaa", "versions": {"torch": "2.0", "scipy": "1"}}
    mixed = results.result("T", ["a"], [["1"]], "N", versions={"torch": "2.1"}, kept=old)
    assert mixed["commit"] == "aaa and bbb" and mixed["versions"] == {"torch": "2.0 and 2.1"}
    unknown = results.result("T", ["a"], [["1"]], "N", versions={}, kept={"versions": {}})
    assert unknown["commit"] == "bbb and unknown"
    again = results.result("T", ["a"], [["1"]], "N", versions={"torch": "2.1"}, kept=mixed)
    assert again["commit"] == "aaa and bbb"

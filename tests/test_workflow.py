"""The workflow of outsiders' changes runs what the Makefile offers, on what pyproject promises."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def jobs():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)["jobs"]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def steps(jobs, key):
    return [step[key] for job in jobs.values() for step in job["steps"] if key in step]


def test_every_command_is_a_target_of_the_makefile(jobs):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    commands = steps(jobs, "run")
    assert {"make lint", "make test", "make wheel"} == set(commands)
    assert {command.removeprefix("make ") for command in commands} <= targets
    for name in {name for job in jobs.values() for name in job.get("env", {})}:
        assert re.search(rf"^{name} +\?=", makefile, flags=re.MULTILINE), name


def test_two_pythons_and_the_oldest_and_newest_transformers_are_tested(jobs, project):
    matrix = jobs["test"]["strategy"]["matrix"]
    promised = SpecifierSet(project["requires-python"])
    assert len(matrix["python"]) == 2
    assert all(isinstance(python, str) and python in promised for python in matrix["python"])
    (needed,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    oldest, newest = map(Requirement, matrix["transformers"])
    bounds = {spec.operator: spec.version for spec in needed.specifier}
    assert str(oldest.specifier) == f"=={bounds['>=']}.*"
    assert str(newest.specifier) == f"<{bounds['<']}"


def test_the_readme_installs_what_pyproject_names(project):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf'"{project["name"]}\[?\w* ?@ git\+', readme)
    for extra in re.findall(r"'\.\[(\w+)\]'", readme):
        assert extra in project["optional-dependencies"]


def test_every_expression_names_something_of_the_matrix(jobs):
    for job in jobs.values():
        matrix = job.get("strategy", {}).get("matrix", {})
        assert {m[1] for m in re.finditer(r"\$\{\{ matrix\.(\w+) \}\}", str(job))} == set(matrix)


def test_the_wheels_tests_exist_and_the_script_is_sound():
    script = ROOT / ".ci" / "wheel"
    text = script.read_text(encoding="utf-8")
    assert script.stat().st_mode & 0o111
    named = re.findall(r"tests/[\w/]+\.py", text)
    assert named and all((ROOT / name).exists() for name in named)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0

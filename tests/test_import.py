"""`import qtk` beside packages that are missing or noisy, in a process of its own."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOISE = """
import logging, warnings
logging.getLogger(__name__).warning("Failed to load a library")
logging.warning("another one")
warnings.warn("an old name", FutureWarning, stacklevel=1)
"""


def run(code: str, *folders: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.path[:0] = {[str(p) for p in (*folders, ROOT, ROOT / 'kernels')]}\n"
    done = subprocess.run(
        [sys.executable, *flags, "-c", start + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_a_model_is_quantized_where_triton_is_missing() -> None:
    run(
        "sys.modules['triton'] = None\n"
        "import qtk, torch\n"
        "from qtk.discover import load\n"
        "model, batch = load('models', 'bert').tiny()\n"
        "q = qtk.quantize(model, calib=[batch], preset='fast', progress=False)\n"
        "assert torch.isfinite(q(**batch)[0]).all()\n"
    )
    assert not any("triton" in needed for needed in project()["dependencies"])


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """The folder of a torchao that says much when it is imported."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text(f"__version__ = '99.0'\n{NOISE}")
    safetensors = tmp_path / "torchao" / "prototype" / "safetensors"
    safetensors.mkdir(parents=True)
    (safetensors / "safetensors_support.py").write_text(
        "flatten_tensor_state_dict = unflatten_tensor_state_dict = None\n"
    )
    (safetensors / "safetensors_utils.py").write_text("is_metadata_torchao = None\n")
    info = tmp_path / "torchao-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 99.0\n")
    return tmp_path


def test_the_import_is_quiet_beside_a_noisy_torchao(noisy: Path) -> None:
    heard = run("import transformers.quantizers", noisy, flags=("-W", "always::FutureWarning"))
    assert "Failed to load" in heard.stderr and "an old name" in heard.stderr
    done = run("import qtk; assert 'torchao' in sys.modules", noisy, flags=("-W", "always"))
    for said in ("Failed to load", "another one", "an old name"):
        assert said not in done.stderr + done.stdout
    run(
        "import qtk, logging, warnings\n"
        "assert logging.getLogger('else').isEnabledFor(logging.WARNING)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); warnings.warn('ours')\n"
        "assert len(seen) == 1\n",
        noisy,
    )


def test_messages_name_the_distribution_and_its_extras() -> None:
    name, extras = project()["name"], project()["optional-dependencies"]
    named = set()
    for path in (ROOT / "qtk").rglob("*.py"):
        for part in path.read_text(encoding="utf-8").split("pip install '")[1:]:
            distribution, _, extra = part.partition("'")[0].partition("[")
            assert distribution == name, path
            named.add(extra.rstrip("]"))
    assert named <= set(extras) and {"gpu", "images", "plots", "demo"} <= named

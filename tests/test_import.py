"""What importing does, looked at in fresh interpreters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import muvit

ROOT = Path(muvit.__file__).parent
HEAVY = ["torch", "lightning", "matplotlib", "tensorstore", "zarr", "jsonargparse", "numpy", "scipy", "wandb", "napari"]


def loaded_by(statement):
    """Which heavy packages a statement loads."""
    code = f"import sys\n{statement}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(json.loads(done.stdout.replace("'", '"')))


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import muvit; assert muvit.__version__") == set()


@pytest.mark.parametrize(
    "module, absent",
    [
        ("muvit.errors", set(HEAVY)),
        ("muvit.cli", {"torch", "lightning", "matplotlib", "tensorstore"}),
        ("muvit.models.segmenter", {"lightning", "matplotlib", "tensorstore", "jsonargparse"}),
        ("muvit.inference.predict", {"lightning", "matplotlib", "jsonargparse"}),
    ],
)
def test_modules_load_only_what_they_need(module, absent):
    assert not loaded_by(f"import {module}") & absent


def test_public_names_are_found_at_their_homes():
    for name in muvit.__all__:
        assert getattr(muvit, name) is not None
    with pytest.raises(AttributeError, match="module 'muvit' has no attribute 'nonsense'"):
        _ = muvit.nonsense
    assert set(muvit.__all__) <= set(dir(muvit))


ONE_BY_ONE = """
import importlib, os, sys, traceback, warnings
for package in ("torch", "lightning.pytorch.loggers", "torchmetrics.classification", "jsonargparse", "scipy.ndimage",
                "tensorstore", "tifffile", "openslide", "tqdm", "yaml", "safetensors.torch"):
    importlib.import_module(package)
assert not any(name.split(".")[0] == "muvit" for name in sys.modules)
failed = 0
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        warnings.simplefilter("error")
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed += 1
        print(name, file=sys.stderr)
sys.exit(failed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_can_be_imported_first_and_without_warnings():
    files = sorted(ROOT.rglob("*.py"))
    names = [
        ".".join(("muvit", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for file in files
    ]
    assert len(names) > 40
    done = subprocess.run([sys.executable, "-c", ONE_BY_ONE, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

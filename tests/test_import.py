"""What importing does, looked at in fresh interpreters."""

import ast
import inspect
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tifffile

import muvit
import muvit.data

ROOT = Path(muvit.__file__).parent
HEAVY = [
    "torch",
    "lightning",
    "torchmetrics",
    "torchvision",
    "matplotlib",
    "tensorstore",
    "zarr",
    "jsonargparse",
    "numpy",
    "scipy",
    "wandb",
    "napari",
]


def loaded_by(statement):
    """Which heavy packages a statement loads."""
    code = f"import sys\n{statement}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(json.loads(done.stdout.replace("'", '"')))


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import muvit; assert muvit.__version__") == set()


def typed_homes(package):
    """Module of each public name as type checkers read it, under ``if TYPE_CHECKING``."""
    tree = ast.parse(Path(package.__file__).read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {alias.name: node.module for block in blocks for node in block.body for alias in node.names}


@pytest.mark.parametrize("package", [muvit, muvit.data], ids=lambda package: package.__name__)
def test_public_names_are_the_same_for_python_and_type_checkers(package):
    lazy = {name: f"{package.__name__}.{home}" for name, home in package._HOME.items()}
    assert lazy == typed_homes(package)
    assert set(lazy) == {*package.__all__} - {"__version__"} == {*dir(package)} - {"__version__"}
    for name, home in lazy.items():
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__ == home, "a public name is imported from where it is defined"
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nonsense'"):
        _ = package.nonsense


@pytest.mark.parametrize(
    "module, absent",
    [
        ("muvit.errors", set(HEAVY)),
        ("muvit.cli", {"torch", "lightning", "matplotlib", "tensorstore"}),
        ("muvit.data.slides.slide", set(HEAVY) - {"numpy"}),
        ("muvit.data.pyramids.convert", {"torch", "lightning", "matplotlib", "jsonargparse"}),
        ("muvit.training.recipes", {"lightning", "torchmetrics", "torchvision", "matplotlib", "jsonargparse"}),
        pytest.param(
            "muvit.models.segmenter",
            {"lightning", "matplotlib", "tensorstore", "jsonargparse"},
            marks=pytest.mark.long,
        ),
        ("muvit.inference.predict", {"lightning", "matplotlib", "jsonargparse", "scipy"}),
    ],
)
def test_modules_load_only_what_they_need(module, absent):
    assert not loaded_by(f"import {module}") & absent


RECIPE = "data: {train: x}\nmodel: {num_classes: 3, encoder: {in_channels: 1, levels: [1, 4]}}\n"
TRAINS = {"torch", "lightning", "torchmetrics", "torchvision"}


@pytest.mark.parametrize(
    ("argv", "code", "absent"),
    [
        ("--version", 0, TRAINS | {"numpy"}),
        ("--help", 0, TRAINS | {"numpy"}),
        ("trian", 2, TRAINS | {"numpy"}),
        ("info image.tif", 0, TRAINS | {"matplotlib", "scipy", "tensorstore"}),
        ("convert image.tif --output out", 0, TRAINS | {"matplotlib", "scipy"}),
        ("export labels.tif --geojson --output out", 0, TRAINS),
        ("evaluate labels.tif labels.tif --num_classes 2", 0, TRAINS | {"matplotlib"}),
        *(
            pytest.param(f"{verb} --help", 0, TRAINS, marks=pytest.mark.long)
            for verb in (
                "info",
                "convert",
                "export",
                "evaluate",
                "prepare",
                "synthetic",
                "classify",
                "study",
                "suggest",
                "push",
            )
        ),
        *((f"{verb} --help", 0, TRAINS | {"scipy", "tensorstore"}) for verb in ("predict", "features", "demo")),
        ("train --help", 0, TRAINS - {"torch"}),
        pytest.param("compare --help", 0, TRAINS - {"torch"}, marks=pytest.mark.long),
        ("train --config broken.yaml --output out", 2, TRAINS),
        ("train --config typo.yaml --output out", 2, TRAINS - {"torch"}),
        ("train --config huge.yaml --output out", 1, TRAINS - {"torch"}),
    ],
)
def test_a_command_loads_only_what_it_needs(tmp_path, monkeypatch, argv, code, absent):
    monkeypatch.chdir(tmp_path)
    for name in ("image", "labels"):
        tifffile.imwrite(f"{name}.tif", np.ones((64, 64), np.uint8))
    Path("broken.yaml").write_text("data: [")
    Path("typo.yaml").write_text(RECIPE.replace("levels", "level"))
    Path("huge.yaml").write_text(RECIPE + "model.encoder.dim: 10000000\n")
    silent = "with open(os.devnull, 'w') as none, redirect_stdout(none), redirect_stderr(none):"
    lines = ["import os", "from contextlib import redirect_stderr, redirect_stdout", "from muvit.cli import main"]
    lines += [silent, f"    code = main({argv.split()!r})", f"assert code == {code}, code"]
    assert not loaded_by("\n".join(lines)) & absent


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "muvit", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"muvit {muvit.__version__}\n")


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


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_module_can_be_imported_first_and_without_warnings():
    files = sorted(ROOT.rglob("*.py"))
    names = [
        ".".join(("muvit", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for file in files
    ]
    assert len(names) > 40
    if find_spec("napari") is None:  # which alone loads it
        names.remove("muvit.viewer.widget")
    done = subprocess.run([sys.executable, "-c", ONE_BY_ONE, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def imported(file, modules):
    """Modules of the package that a file imports anywhere, in functions too, but for type checking."""
    pending, found = [ast.parse(file.read_text())], set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {name if (name := f"{node.module}.{a.name}") in modules else node.module for a in node.names}
    return found & modules.keys()


def test_no_module_imports_itself_by_way_of_others():
    modules = {}
    for file in ROOT.rglob("*.py"):
        parts = ("muvit", *file.relative_to(ROOT).with_suffix("").parts)
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    TopologicalSorter({name: imported(file, modules) for name, file in modules.items()}).prepare()

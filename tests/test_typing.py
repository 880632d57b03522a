"""Types of the public names, as a user's mypy sees them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_mypy_sees_types_and_refuses_wrong_arguments(tmp_path):
    """``tests/typing/user.py`` asserts the types; an error that it ignores must be there, or mypy reports that."""
    command = [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir", tmp_path]
    command += ["--strict", "--follow-imports=silent", ROOT / "tests" / "typing" / "user.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""Release 0.1.0, which has the same import name and therefore lives in its own environment."""

import shutil
import subprocess
import sys
from pathlib import Path

RELEASE = "muvit==0.1.0"


def build_environment(folder: Path, *packages: str) -> Path:
    """Install the release, and other packages, into a virtual environment, with uv if it is there; its interpreter."""
    own_uv = Path(__file__).parents[1] / ".uv" / "bin" / "uv"
    uv = own_uv if own_uv.exists() else shutil.which("uv")
    python = folder / "bin" / "python"
    if uv is None:
        call(sys.executable, "-m", "venv", folder)
        call(python, "-m", "pip", "install", "--quiet", RELEASE, *packages)
    else:
        call(uv, "venv", "--quiet", "--python", sys.executable, folder)
        call(uv, "pip", "install", "--quiet", "--python", python, RELEASE, *packages)
    return python


def call(*command: object) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)} failed:\n{done.stderr}")
    return done.stdout

"""The record of what the code gives: written once by ``python tests/golden/record.py``, compared by the tests.

Floats are recorded as mean, deviation, a projection on fixed numbers (which a permutation changes) and a few values;
integers as a hash of all of them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import builders
import numpy as np
import torch
from torch import Tensor

RECORD = Path(__file__).parent / "recorded.json"
TOLERANCE = 1e-5
"""Of floats, relative to themselves or to their deviation, whichever is larger: what another processor may round."""
NUM_VALUES = 6


def digest(values: np.ndarray) -> str:
    """Hash of integers, whatever their width."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<i8").tobytes()).hexdigest()[:16]


def summary(values: Tensor) -> dict[str, object]:
    shape = list(values.shape)
    if not values.is_floating_point():
        return {"shape": shape, "hash": digest(values.numpy())}
    flat = values.detach().double().flatten().numpy()
    chosen = flat[np.linspace(0, len(flat) - 1, min(NUM_VALUES, len(flat))).astype(int)]
    if len(flat) <= NUM_VALUES:
        return {"shape": shape, "values": rounded(chosen)}
    numbers = [flat.mean(), flat.std(), (flat * builders.uniform("projection", flat.shape)).mean(), *chosen]
    return {"shape": shape, "values": rounded(numbers)}


def rounded(numbers: object) -> list[float]:
    return [float(f"{number:.7g}") for number in numbers]


def summaries(results: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    return {name: summary(values) for name, values in results.items()}


def differences(found: Mapping[str, dict], recorded: Mapping[str, dict], tolerance: float = TOLERANCE) -> list[str]:
    """What differs, in words; nothing if all is as it was recorded."""
    lines = [f"{name}: not in both" for name in sorted(set(found) ^ set(recorded))]
    for name in sorted(set(found) & set(recorded)):
        now, then = found[name], recorded[name]
        if "values" not in now or "values" not in then or now["shape"] != then["shape"]:
            lines += [] if now == then else [f"{name}: {now} instead of {then}"]
            continue
        a, b = np.array(now["values"]), np.array(then["values"])
        spread = b[1] if len(b) > NUM_VALUES else 0.0
        if not np.allclose(a, b, rtol=tolerance, atol=tolerance * spread, equal_nan=True):
            lines.append(f"{name}: {a} instead of {b}, off by {np.abs(a - b).max():.2g}, deviation {spread:.2g}")
    return lines


def main() -> None:
    from cases import CASES
    from folders import outputs, write_folders

    write_folders()
    record = {name: summaries(case()) for name, case in CASES.items()}
    record["folders"] = outputs()
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

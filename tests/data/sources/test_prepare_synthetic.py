import json

import pytest

from muvit.data.folders import open_labelled_folder
from muvit.data.sources.synthetic import prepare_synthetic
from muvit.data.synthetic.images import SyntheticConfig, write_synthetic
from muvit.errors import ExistsError, InputError

COUNTS = {"num_train": 2, "num_val": 1, "num_test": 1, "workers": 1}
SMALL = SyntheticConfig(size_px=64, radius_px=(10.0, 30.0), max_rings=1)


def content(folder):
    return {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_an_interrupted_run_goes_on_to_the_same_images(tmp_path):
    def interrupt(done, total):
        if done == 3:
            raise KeyboardInterrupt

    output = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        prepare_synthetic(output, **COUNTS, config=SMALL, progress=interrupt)
    assert not (output / "synthetic.json").exists()
    before = {f: f.stat().st_mtime_ns for f in output.rglob("*.ome.zarr/zarr.json")}
    # the second image lost its label half-way, as when a process is killed
    half = output / "train" / "labels" / "00001.ome.zarr" / "zarr.json"
    half.rename(half.with_name("unfinished.json"))
    steps = []
    prepare_synthetic(output, **COUNTS, config=SMALL, progress=lambda *step: steps.append(step))
    assert steps == [(2, 4), (3, 4), (4, 4)]
    kept = [f for f in before if "00001" not in f.parent.name]
    assert len(kept) == 4
    assert all(f.stat().st_mtime_ns == before[f] for f in kept)

    straight = content(write_synthetic(tmp_path / "straight", **COUNTS, config=SMALL))
    files = content(output)
    assert files.keys() - straight.keys() == {
        f.relative_to(output) for f in output.glob("*.[jc]s*") if f.stem != "synthetic"
    }
    assert {file: files[file] for file in straight} == straight
    assert json.loads((output / "prepare.json").read_text())["dataset"] == "synthetic"
    assert len(open_labelled_folder(output / "train")) == 2


def test_other_images_are_refused_until_they_may_begin_anew(tmp_path):
    prepare_synthetic(tmp_path / "set", **COUNTS, config=SMALL)
    more = COUNTS | {"num_train": 3}
    with pytest.raises(InputError, match=r"expected indices .*\[0, 2\].* as it was begun with, got .*\[0, 3\]"):
        prepare_synthetic(tmp_path / "set", **more, config=SMALL)
    prepare_synthetic(tmp_path / "set", **more, config=SMALL, overwrite=True)
    assert len((tmp_path / "set" / "slides.csv").read_text().splitlines()) == 6
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "synthetic.json").touch()
    with pytest.raises(ExistsError):
        prepare_synthetic(tmp_path / "other", **COUNTS, config=SMALL)


def test_bad_counts_leave_nothing_behind(tmp_path):
    for change, message in (({"num_val": -1}, "num_val"), ({"workers": 0}, "workers")):
        with pytest.raises(InputError, match=message):
            prepare_synthetic(tmp_path / "set", **COUNTS | change, config=SMALL)
    assert not list((tmp_path / "set").rglob("*.ome.zarr"))

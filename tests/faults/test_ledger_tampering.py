"""Plans and ledgers that were changed by hand: never believed, never a traceback."""

import json
import shutil
import zlib

import pytest
from tiny_prediction import hashes, make_model_and_image, predict

from muvit.inference.run.label_blocks import LabelStore, prediction_status
from muvit.inference.run.resume import Ledger, read_ledgers

PLAN, LEDGER = "image.ome.zarr/.muvit/plan.json", "image.ome.zarr/.muvit/part-1-of-2.ledger"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_model_and_image(folder)
    assert predict(folder, folder / "whole") == 0
    assert predict(folder, folder / "begun", "--part", "1/2") == 0
    return folder


@pytest.fixture
def begun(work, tmp_path):
    """A copy of an unfinished prediction."""
    shutil.copytree(work / "begun", tmp_path / "begun")
    return tmp_path / "begun"


def lines_of(output):
    return [line.partition(" ")[2] for line in (output / LEDGER).read_text().splitlines()]


EMPTY = {"seams": [0, 12, 0, 12], "labels": [0, 0], "probabilities": [0, 0]}


@pytest.mark.parametrize("text", [json.dumps(["block 1", EMPTY]), "[", "3", '["block 1"]', '[["block 1"], 3]'])
def test_a_line_with_the_checksum_of_itself_alone_is_not_believed(work, begun, caplog, text):
    before = prediction_status(begun / "image.ome.zarr").blocks
    with (begun / LEDGER).open("a") as ledger:
        ledger.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
    assert prediction_status(begun / "image.ome.zarr").blocks == before
    assert "is damaged or of another plan; its piece is computed again" in caplog.text
    assert predict(work, begun) == 0
    assert hashes(begun) == hashes(work / "whole")


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("block 1", EMPTY),  # a probability of one of three classes is above 0
        ("block 1", {"labels": [0, 0], "probabilities": [0, 0]}),
        ("block 1", {"seams": ["a"] * 4, "labels": [0, 0], "probabilities": [5, 0]}),
        ("block 1", {"seams": [0] * 4}),
        ("block 1", [0, 0]),
        ("block 1", None),
        ("block 99", EMPTY),
        ("block -1", EMPTY),
        ("block", EMPTY),
        ("block x", EMPTY),
        ("", EMPTY),
        ("labels 1 0 0", [0, "0"]),
        ("labels 1 0", [0, 0]),
        ("labels 7 0 0", [0, 0]),
        ("labels 0 32 0", [0, 0]),
        ("labels 1 5 5", [0, 0]),
        ("masks 1 0 0", [0, 0]),
    ],
)
def test_an_entry_that_no_run_makes_is_not_believed(work, begun, key, entry):
    store = LabelStore.open(begun / "image.ome.zarr")
    before = store.done()
    with Ledger(begun / LEDGER, store._plan_hash) as ledger:
        ledger.record(key, entry)
    assert store.done() == before
    prediction_status(begun / "image.ome.zarr")


def test_a_forged_line_that_calls_a_block_empty_is_found_by_verifying(work, tmp_path, capfd):
    options = ["--probabilities", "null"]
    assert predict(work, tmp_path, *options, "--part", "1/2") == 0
    store = LabelStore.open(tmp_path / "image.ome.zarr")
    with store.ledger("forged") as ledger:
        ledger.record("block 1", {"seams": [0, 12, 0, 12], "labels": [0, 0]})
    assert predict(work, tmp_path, *options) == 0
    assert predict(work, tmp_path, *options) == 0
    capfd.readouterr()
    assert predict(work, tmp_path, *options, "--verify") == 1
    assert "expected pixels in block 1, as the model computes them, got none, as its ledger said." in (
        capfd.readouterr().err
    )


def test_a_ledger_of_another_plan_is_not_believed(work, begun, tmp_path):
    assert predict(work, tmp_path / "other", "--part", "1/2", "--overlap", "0") == 0
    shutil.copy(tmp_path / "other" / LEDGER, begun / LEDGER)
    store = LabelStore.open(begun / "image.ome.zarr")
    assert not store.done()
    assert predict(work, begun) == 0
    assert hashes(begun) == hashes(work / "whole")


def test_a_plan_that_was_changed_is_refused_and_its_ledger_is_of_no_use(work, begun, capfd):
    plan = json.loads((begun / PLAN).read_text())
    plan["options"]["average"] = "logits"
    (begun / PLAN).write_text(json.dumps(plan))
    assert prediction_status(begun / "image.ome.zarr").blocks == 0
    assert predict(work, begun) == 1
    assert "options.average logits then, probabilities now" in capfd.readouterr().err


def test_an_image_may_move(work, begun):
    plan = json.loads((begun / PLAN).read_text())
    plan["image"]["path"] = "/elsewhere/image.ome.zarr"
    (begun / PLAN).write_text(json.dumps(plan))
    before = read_ledgers(begun / "image.ome.zarr/.muvit", LabelStore.open(begun / "image.ome.zarr")._plan_hash)
    assert before
    assert predict(work, begun) == 0


def changed(*path, value):
    def change(plan):
        inner = plan
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        return json.dumps(plan)

    return change


ODD_PLANS = {
    "nested": lambda _: "[" * 100_000,
    "nested objects": lambda _: '{"a":' * 500 + "1" + "}" * 500,
    "huge": lambda _: '{"a": "' + "x" * (33 << 20) + '"}',
    "empty": lambda _: "",
    "a list": lambda _: "[]",
    "no plan": lambda _: "{}",
    "a digit of 5000": lambda _: '{"a": ' + "9" * 5000 + "}",
    "not unicode": lambda _: b"\xff\xfe{}",
    "tiling": changed("tiling", value=3),
    "tiling with runs": changed("tiling", "runs", value="0 x"),
    "tiling of numbers": changed("tiling", "shapes", value=[[1e400]]),
    "tiling without end": changed("tiling", "block_size", value=[0, 0]),
    "a large tiling": changed("tiling", "shapes", value=[[10**12, 10**12], [10**11, 10**11]]),
    "options": changed("options", value=[]),
    "an option": changed("options", "flips", value={"a": 1}),
    "a store": changed("stores", "labels", value=None),
    "its chunk": changed("stores", "labels", "chunk", value=0),
    "its shape": changed("stores", "labels", "shape", value=["a", None]),
    "a store elsewhere": changed("stores", value={"../../x": {}}),
    "image": changed("image", value=7),
    "preprocessing": changed("preprocessing", value={"crop_size": "x"}),
    "version": changed("version", value=None),
}


@pytest.mark.parametrize("name", ODD_PLANS)
def test_an_odd_plan_is_one_sentence_and_can_be_replaced(work, begun, capfd, name):
    made = ODD_PLANS[name](json.loads((begun / PLAN).read_text()))
    (begun / PLAN).write_bytes(made if isinstance(made, bytes) else made.encode())
    capfd.readouterr()
    for more in ("--status",), ():
        code = predict(work, begun, *more)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert code == 1 or (more and "unfinished, 0 of" in out)  # a plan that could be, but is not that of the ledger
        assert code == 0 or len(err.splitlines()) == 1
    if name == "nested":
        assert predict(work, begun, "--overwrite") == 0
        assert hashes(begun) == hashes(work / "whole")

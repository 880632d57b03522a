import tracemalloc

import pytest
import yaml

from muvit.errors import ReadError
from muvit.plain_yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, check_yaml, read_text

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' twice, at lines 1 and 3"),
        ("x:\n  - {k: 1, 'k': 2}\n", "the key 'k' twice, at lines 2 and 2"),
        (LAUGHS, "more than 20000 values or 30 levels of nesting at line 5"),
        (CHAIN, "levels of nesting at line"),
        ("[" * 5000 + "]" * 5000, "more than 30 lists and mappings inside each other at line 1"),
        ("{a: " * 5000 + "}" * 5000, "more than 30 lists and mappings inside each other at line 1"),
        ("a: &a [1, *a]", "an alias that contains itself at line 1"),
        ("#" * (MAX_BYTES + 1), "more than 65536 characters"),
        ("a: *b", "undefined alias"),
        ("a: [", "expected the node content"),
    ],
)
def test_text_beyond_the_bounds_is_refused_at_little_cost(text, said):
    tracemalloc.start()
    try:
        with pytest.raises(yaml.YAMLError, match=said):
            check_yaml(text)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1",
        "base: &b {lr: 1, epochs: 2}\nrun: {<<: *b, lr: 3}\nother: *b\n",
        "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1),
        f"[{', '.join(['1'] * (MAX_NODES - 1))}]",
        "{1: a, '1': b}",
    ],
)
def test_text_within_the_bounds_passes(text):
    check_yaml(text)


def test_nested_size_is_counted_through_aliases():
    ten = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    check_yaml(ten + f"b: [{', '.join(['*a'] * 1990)}]\n")
    with pytest.raises(yaml.YAMLError, match="more than 20000 values"):
        check_yaml(ten + f"b: [{', '.join(['*a'] * 2010)}]\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "codec can't decode"),
        (b"a: [", "expected the node content"),
        (b"#" * (MAX_BYTES + 1), "more than 65536 bytes"),
        (None, "No such file or directory"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, content, said):
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ReadError, match=f"recipe.yaml: expected settings in YAML, got .*{said}"):
        read_text(file)


def test_an_endless_file_is_not_read_to_its_end():
    with pytest.raises(ReadError, match="more than 65536 bytes"):
        read_text("/dev/zero")

"""YAML read within bounds: plain data, each key once, and no text that takes long to read or much memory to hold."""

from pathlib import Path
from typing import Any

import yaml

from muvit.errors import ReadError

MAX_BYTES = 2**16
"""Largest file of settings; recipes have about 2,000 bytes."""
MAX_DEPTH = 30
"""Deepest nesting of lists and mappings, aliases followed."""
MAX_NODES = 20_000
"""Most values, keys and containers, each alias counted as the whole that it stands for."""


class BoundsError(yaml.YAMLError):
    """The text is YAML, but beyond the bounds; the message says where."""


class _Composer(yaml.SafeLoader):
    """Composes nodes bottom-up, so that the size and depth of an alias are known where it is used."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._measured: dict[int, tuple[int, int]] = {}  # of a node: nodes in it, depth
        self._open = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        self._open += 1
        if self._open > MAX_DEPTH:
            raise BoundsError(f"more than {MAX_DEPTH} lists and mappings inside each other at line {line}")
        node = super().compose_node(parent, index)
        self._open -= 1
        if node is None:
            return None
        if id(node) not in self._measured:
            if self._is_open(node):
                raise BoundsError(f"an alias that contains itself at line {line}")
            self._measured[id(node)] = self._measure(node)
        nodes, depth = self._measured[id(node)]
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise BoundsError(f"more than {MAX_NODES} values or {MAX_DEPTH} levels of nesting at line {line}")
        return node

    def _is_open(self, node: yaml.Node) -> bool:
        # the end of a container is marked when its last child has been read
        return isinstance(node, yaml.CollectionNode) and node.end_mark is None

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes = [self._measured[id(child)] for child in children]
        return 1 + sum(nodes for nodes, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)


def check_yaml(text: str) -> None:
    """Refuse YAML beyond the bounds, before anything is made of it.

    Raises:
        yaml.YAMLError: it is no YAML, a key stands twice in one mapping, or it is too large or nested too deeply.
    """
    if len(text) > MAX_BYTES:
        raise BoundsError(f"more than {MAX_BYTES} characters")
    loader = _Composer(text)
    try:
        loader.get_single_node()
    finally:
        loader.dispose()


def read_text(file: Path | str, expected: str = "settings in YAML") -> str:
    """Text of a YAML file, checked by `check_yaml`.

    Raises:
        ReadError: the file cannot be read, or is not YAML within the bounds; names the line.
    """
    try:
        with Path(file).open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise BoundsError(f"more than {MAX_BYTES} bytes")
        text = content.decode()
        check_yaml(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ReadError(file, expected=expected, got=yaml_problem(error)) from error
    return text


def read_yaml(file: Path | str, expected: str = "settings in YAML") -> Any:
    """Plain values of a YAML file.

    Raises:
        ReadError: the file cannot be read, or is not plain YAML within the bounds.
    """
    text = read_text(file, expected)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise ReadError(file, expected=expected, got=yaml_problem(error).partition(";")[0]) from error


def yaml_problem(error: Exception) -> str:
    """The message of an error of YAML in one line, with the place."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is not None and mark is not None:
        return f"{problem} at line {mark.line + 1}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines:
            raise BoundsError(f"the key {key.value!r} twice, at lines {lines[name]} and {line}")
        lines[name] = line

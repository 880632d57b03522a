"""What the argument parser says of a wrong setting, in one sentence of ours."""

import re

_UNION = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\": Does not validate against any of the Union subtypes.*?"
    r"Problem with given class_path '[^']+': (?P<inner>.*?) - Expected a <class 'NoneType'>.*"
)
_LITERAL = re.compile(
    r"Parser key \"(?P<key>[\w.]+)\": Expected a typing\.Literal\[(?P<allowed>.*?)\]\. Got value: (?P<got>.*)"
)


def sentence(message: str) -> str:
    """The message of a parser, shortened where it speaks of types that no user has heard of.

    An optional group of settings is a union of types to the parser, which reports why each of them does not fit; what
    the user got wrong stands in the first report.
    """
    text = " ".join(message.split())
    union = _UNION.fullmatch(text)
    if union:
        inner = union["inner"].replace('Parser key "', f'Parser key "{union["key"]}.')
        text = inner if inner.startswith("Parser key") else f"{union['key']}.{inner}"
    literal = _LITERAL.fullmatch(text)
    if literal:
        allowed = literal["allowed"].replace("'", "")
        return f"{literal['key']}: expected one of {allowed}, got {literal['got']}"
    return text

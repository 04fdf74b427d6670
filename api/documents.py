"""The text of one YAML file to typed objects."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

from undermesh.api.decode import DecodeError, decode, unwrap
from undermesh.api.objects import Object
from undermesh.api.problems import Problem

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CORE_TAGS: Final = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")
)
_ADVICE_EMPTY: Final = "holds no object: add one, or delete the file"


class _Loader(_Base):  # type: ignore[misc]
    """YAML as Kubernetes reads it: JSON's types only (a date stays text) and no key twice in a mapping."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: construct for tag, construct in _Base.yaml_constructors.items() if tag is None or tag in _CORE_TAGS
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is no text", problem_mark=key.start_mark)
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


@dataclass(frozen=True)
class Located:
    """An object and where it stands."""

    file: str
    document: int
    item: int
    object: Object

    @property
    def place(self) -> str:
        return f"{self.file} document {self.document}" + (f" item {self.item}" if self.item else "")


def parse(file: str, data: bytes) -> tuple[tuple[Located, ...], tuple[Problem, ...]]:
    """Every object of a multi-document YAML file, Lists unpacked, and every problem found.

    Never raises for any content. A file without a single object is a problem too: that is how a file
    looks which is just being rewritten. What stands behind broken YAML is not read.
    """
    objects: list[Located] = []
    problems: list[Problem] = []
    document = 0
    try:
        for document, raw in _documents(data):
            _decode_document(file, document, raw, objects, problems)
    except (
        yaml.YAMLError,
        UnicodeDecodeError,
        RecursionError,
        ArithmeticError,
        LookupError,
        ValueError,
    ) as error:
        problems.append(Problem(file, _yaml_message(error), document=document + 1))
    if not objects and not problems:
        problems.append(Problem(file, _ADVICE_EMPTY))
    return tuple(objects), tuple(problems)


def _documents(data: bytes) -> Iterator[tuple[int, object]]:
    loader = _Loader(data.decode("utf-8-sig"))
    number = 0
    try:
        while loader.check_data():
            number += 1
            yield number, loader.get_data()
    finally:
        loader.dispose()


def _decode_document(file: str, document: int, raw: object, objects: list[Located], problems: list[Problem]) -> None:
    if raw is None:
        return
    item = 0
    try:
        for item, part in unwrap(raw):
            try:
                objects.append(Located(file, document, item, decode(part)))
            except DecodeError as error:
                problems.append(_problem(file, document, item, error))
    except DecodeError as error:
        problems.append(_problem(file, document, 0, error))


def _problem(file: str, document: int, item: int, error: DecodeError) -> Problem:
    return Problem(file, error.message, document=document, item=item, subject=error.subject, field=error.field)


def _yaml_message(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        cause = error.problem or error.context
        return f"no valid YAML at line {mark.line + 1} column {mark.column + 1}: {str(cause)[:256]}"
    if isinstance(error, UnicodeDecodeError):
        return f"no valid YAML: byte {error.start + 1} is no UTF-8"
    if isinstance(error, RecursionError):
        return "no valid YAML: nested too deep"
    return f"no valid YAML: {str(error)[:256]}"

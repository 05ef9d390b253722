"""Reader and writer of YAML: scalars as in YAML 1.2, no duplicate keys, and output that reads back to the same values.

The reader accepts null, booleans, numbers, strings, lists and mappings, and limits their number and depth. So a file
of a stranger cannot create objects, fill the memory by aliases, or exceed the recursion limit.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from elmo_ray.errors import ConfigError, one_line, short

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
_RESOLVERS = (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT))

_MOST_CHARACTERS = 1 << 20
_MOST_VALUES = 100_000  # an alias counts each time it is used
_DEEPEST = 40


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain scalars of YAML 1.2: `off` and `no` are strings, and `3e-4` is a number."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {
        None: [(f"tag:yaml.org,2002:{kind}", pattern) for kind, pattern in _RESOLVERS]
    }


def _null(loader: yaml.SafeLoader, node: yaml.Node) -> None:
    if _NULL.match(_scalar(node)) is None:
        raise _problem("not null", node)


def _bool(loader: yaml.SafeLoader, node: yaml.Node) -> bool:
    text = _scalar(node)
    if _BOOL.match(text) is None:
        raise _problem("not true or false", node)
    return text.lower() == "true"


def _int(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    return int(_scalar(node).replace("_", ""))


def _float(loader: yaml.SafeLoader, node: yaml.Node) -> float:
    return float(_scalar(node).replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


def _mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _problem("not a mapping", node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if not isinstance(key, Hashable):
            raise _problem("a key must be a word", key_node)
        if key in result:
            raise _problem(f"the key {key} is given twice", key_node)
        result[key] = loader.construct_object(value_node, deep=True)  # type: ignore[no-untyped-call]
    return result


def _scalar(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _problem("not a single value", node)
    return str(node.value)


def _problem(text: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


# These replace SafeLoader's constructors, which also make dates, bytes and sets; no setting has such a value.
_Loader.yaml_constructors = {
    "tag:yaml.org,2002:null": _null,
    "tag:yaml.org,2002:bool": _bool,
    "tag:yaml.org,2002:int": _int,
    "tag:yaml.org,2002:float": _float,
    "tag:yaml.org,2002:map": _mapping,
    "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
    "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
    None: yaml.SafeLoader.construct_undefined,
}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes strings that only our reader would take for a number or null."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _pattern in _RESOLVERS:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, list("~nN-+0123456789.tTfF"))
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of one YAML document.

    Raises ConfigError for a bad document; its message begins with `where` (a file or a key).
    """
    place = one_line(where)
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(f"{place}: has more than {_MOST_CHARACTERS} characters; settings are shorter")
    try:
        value = yaml.load(text, Loader=_Loader)
        check_size(value)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ConfigError(f"{place}{line}: {short(error.problem or error.context or 'not YAML')}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not YAML: {short(str(error))}") from None
    return value


def check_size(value: Any) -> None:
    """Raise ValueError if there are too many plain values or they are nested too deep.

    An alias counts each time it is used.
    """
    _size(value, {}, 0)


def _size(value: Any, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """Return the number of values inside this one, itself included, and their depth."""
    if not isinstance(value, dict | list | tuple):
        return 1, 0
    if id(value) not in known:
        if depth > _DEEPEST:  # a list that contains itself ends here
            raise ValueError(f"more than {_DEEPEST} levels deep")
        parts = [_size(part, known, depth + 1) for part in (value.values() if isinstance(value, dict) else value)]
        known[id(value)] = 1 + sum(n for n, _ in parts), 1 + max((height for _, height in parts), default=0)
    count, height = known[id(value)]
    if count > _MOST_VALUES or height > _DEEPEST:
        raise ValueError(f"more than {_MOST_VALUES} values" if count > _MOST_VALUES else f"more than {_DEEPEST} levels")
    return count, height


def dump_yaml(value: Any) -> str:
    """Return a mapping of plain values as YAML, with the keys in their order and each list on one line."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))


def reads_as_text(text: str) -> bool:
    """Return True if our reader takes this plain scalar for a string, not for a number, a boolean or null."""
    return not any(pattern.match(text) for _, pattern in _RESOLVERS)

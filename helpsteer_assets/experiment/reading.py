"""Reading experiment files: YAML, `extends`, and one line for each mistake."""

import difflib
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment, clipped, is_path, shown

_MOST_MISTAKES = 20
_MOST_CHARACTERS = 100_000
"""Most characters of a file with its aliases written out: a few lines of nested aliases can stand for billions."""


SHIPPED = ("demo", "smollm2", "helpsteer")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2: 1e-4 is one, 010 is ten, 1:30 and 2024-01-01 are text.

    It refuses a key that stands twice, tags, endless aliases, and characters that no path and no file can hold.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._characters = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event, before = self.peek_event(), self._characters
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise HelpsteerError(f"line {line}: a tag such as {shown(event.tag)} is not read; remove it")
        node = super().compose_node(parent, index)
        assert node is not None  # an event was there
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                raise HelpsteerError(f"line {line}: the alias *{event.anchor} stands within what it refers to")
            self._characters += self._sizes[node]
        else:
            self._characters += 1 + len(getattr(event, "value", ""))
            self._sizes[node] = self._characters - before
        if self._characters > _MOST_CHARACTERS:
            raise HelpsteerError(
                f"line {line}: with its aliases written out it is longer than {_MOST_CHARACTERS} characters"
            )
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        value = super().construct_scalar(node)
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            line = node.start_mark.line + 1
            raise HelpsteerError(f"line {line}: {shown(value)} holds a NUL or half a surrogate pair; remove it")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise HelpsteerError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice; leave one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] in ("bool", "null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_FLOAT = r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS)
        if len(text) == _MOST_CHARACTERS:
            raise HelpsteerError(f"it has more than {_MOST_CHARACTERS} characters")
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader: it makes plain values only
        if not isinstance(data, dict):
            content = "nothing" if data is None else "a list" if isinstance(data, list) else shown(data)
            raise HelpsteerError(f"expected `key: value` lines, found {content}")
    except FileNotFoundError:
        close = difflib.get_close_matches(path.name, SHIPPED, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        raise HelpsteerError(
            f"experiment {path} not found{hint} (shipped experiments: {', '.join(SHIPPED)}; else give the path of a "
            "YAML file, by HELPSTEER_EXPERIMENT or --experiment)"
        ) from None
    except OSError as error:
        raise HelpsteerError(f"experiment {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise HelpsteerError(f"experiment {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except HelpsteerError as error:
        raise HelpsteerError(f"experiment {path}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        context = f" ({error.context})" if error.context else ""
        raise HelpsteerError(f"experiment {path} is not valid YAML: {line}{error.problem}{context}") from None
    except RecursionError:
        raise HelpsteerError(f"experiment {path} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise HelpsteerError(f"experiment {path} is not valid YAML: {error}") from None
    return data


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = base | changes
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merge(base[key], value)
    return merged


def _absolute_paths(data: dict[str, Any], folder: Path) -> None:
    """Relative paths of a file mean its own folder; make them absolute, in place."""
    for *sections, key in (("data", "source"), ("model", "base"), ("evaluation", "rater", "model")):
        place: Any = data
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(key), str) and is_path(place[key]):
            place[key] = _absolute(place[key], folder)


def _absolute(path: str, folder: Path) -> str:
    # Path.expanduser raises for a user that does not exist; a path that is not found says more.
    return os.path.normpath(folder / os.path.expanduser(path))  # noqa: PTH111


def _load_data(name_or_path: str, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Path]:
    shipped = name_or_path in SHIPPED
    if shipped:
        path = Path(str(resources.files("helpsteer_assets") / "experiments" / f"{name_or_path}.yaml"))
    else:
        path = Path(_absolute(name_or_path, Path.cwd()))
    if os.path.realpath(path) in map(os.path.realpath, seen):
        circle = " -> ".join(str(step) for step in (*seen, path))
        raise HelpsteerError(f"experiment {path}: `extends` goes round in a circle: {circle}")
    data = _read_yaml(path)
    _absolute_paths(data, Path.cwd() if shipped else path.parent)
    parent = data.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise HelpsteerError(f"experiment {path}: `extends` names an experiment or a path, got {shown(parent)}")
        if parent not in SHIPPED:
            name, parent = parent, _absolute(parent, path.parent)
            if not os.path.isfile(parent):  # noqa: PTH113  Path.is_file raises for a name that is too long
                raise HelpsteerError(
                    f"experiment {path}: it extends {name!r}, which is neither a shipped experiment "
                    f"({', '.join(SHIPPED)}) nor a file at {parent}"
                )
        base, _ = _load_data(parent, (*seen, path))
        if data.get("name") in (None, base.get("name")):
            raise HelpsteerError(f"experiment {path}: give it a `name` of its own; it extends {base.get('name')!r}")
        data = _merge(base, data)
    return data, path


def load_experiment(name_or_path: str | None = None) -> Experiment:
    """Read and validate an experiment; without an argument the one that HELPSTEER_EXPERIMENT names (default `demo`).

    Raises HelpsteerError with one line per mistake, each naming its key and what is allowed.
    """
    data, path = _load_data(name_or_path or os.environ.get("HELPSTEER_EXPERIMENT") or "demo")
    try:
        return Experiment.model_validate(data)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(error))
        raise HelpsteerError(f"experiment {path} is not valid:\n{lines}") from None


_EXPECTED = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "list_type": "expected a list, such as [a, b]",
    "dict_type": "expected a section of `key: value` lines",
    "model_type": "expected a section of `key: value` lines",
    "string_pattern_mismatch": "expected letters, digits, `-` and `_`, at most 63, the first a letter or digit",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "invalid_key": "a key is text",
}
"""Words for pydantic's error types whose own would name Python's types or a regular expression."""


def _explain(error: ValidationError) -> list[str]:
    lines = []
    errors = error.errors()
    for item in errors[:_MOST_MISTAKES]:
        location = [part for part in item["loc"] if part not in ("RewardModelSettings", "[key]")]
        where = ".".join(clipped(str(part)) for part in location)
        if item["type"] == "extra_forbidden":
            allowed = _keys_at(location[:-1])
            close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            lines.append(f"{where}: unknown key{hint} (allowed: {', '.join(allowed)})")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing, and there is no default")
        elif item["type"] == "value_error":
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {message}" if where else message)
        else:
            message = _EXPECTED.get(item["type"]) or item["msg"].replace("Input should be", "must be")
            lines.append(f"{where}: {message}, got {shown(item['input'])}")
    if len(errors) > len(lines):
        lines.append(f"... and {len(errors) - len(lines)} more")
    return lines


def _keys_at(location: list[Any]) -> list[str]:
    model: type[BaseModel] = Experiment
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None:
            model = next(iter(_sections(field.annotation)), model)
    return sorted([*model.model_fields, *(["extends"] if model is Experiment else [])])


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]

"""A digest of the code that each stage runs, so that whoever changes any of it is asked whether results change.

    python -m helpsteer_assets_tests.assets.code_digests

stores the present digests. The code of a stage is its function and every definition inside the package that it reaches
by name: functions, classes and constants, through imports at the head of a module and inside functions. Files that the
code names, such as a template, count by their content. Docstrings, comments, type annotations, the lay-out of the code
and the place of a definition count for nothing.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import helpsteer_assets
from helpsteer_assets.assets.graph import STAGES

PACKAGE = Path(helpsteer_assets.__file__).parent
STORED = Path(__file__).with_name("code_digests.json")
REFRESH = "python -m helpsteer_assets_tests.assets.code_digests"
SURROUNDINGS = (("helpsteer_assets.assets.run", "StageRun"), ("helpsteer_assets.assets.loaded", "LoadedModels"))
"""Every stage's function gets an object of the first class, which holds one of the second."""

FILE_NAME = re.compile(r"[\w.]{1,60}\.\w{1,10}")

Definition = tuple[str, str]
"""Module and name; the name `` stands for the statements of a module that define nothing."""


@dataclass
class Module:
    """The definitions of a module, and the definitions elsewhere that its names stand for."""

    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, Definition] = field(default_factory=dict)


class Code:
    """The source of a package."""

    def __init__(self, package: Path = PACKAGE) -> None:
        self._package = package
        self._modules: dict[str, Module | None] = {}

    def stage_digests(self) -> dict[str, str]:
        """The digest of each stage's code, by stage."""
        return {stage.name: self.digest((stage.compute.__module__, stage.name)) for stage in STAGES}

    def digest(self, root: Definition) -> str:
        """SHA-256 over all that a definition reaches."""
        reached = self.reached([root, *SURROUNDINGS])
        pieces = sorted(f"{name} {self._content(module, name)}" for module, name in reached)
        return hashlib.sha256("\n".join(pieces).encode()).hexdigest()[:16]

    def reached(self, roots: list[Definition]) -> set[Definition]:
        """The definitions that the roots reach by name, the roots among them."""
        seen: set[Definition] = set()
        waiting = list(roots)
        while waiting:
            definition = waiting.pop()
            module = self._module(definition[0])
            if definition in seen or module is None:
                continue
            name = definition[1]
            if name in module.imports and name not in module.definitions:
                waiting.append(module.imports[name])  # passed on by another module
            elif name == "*":
                waiting += [(definition[0], name) for name in module.definitions]
            elif name in module.definitions:
                seen.add(definition)
                waiting.append((definition[0], ""))
                for statement in module.definitions[name]:
                    waiting += self._references(definition[0], module, statement)
        return seen

    def _content(self, module: str, name: str) -> str:
        statements = self._modules[module].definitions[name]  # type: ignore[union-attr]  # it was reached
        files = [digest for statement in statements for digest in self._named_files(module, statement)]
        return hashlib.sha256(repr([[_plain(s) for s in statements], files]).encode()).hexdigest()

    def _named_files(self, module: str, statement: ast.stmt) -> Iterator[str]:
        folder = self._path(module).parent
        for node in ast.walk(statement):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and FILE_NAME.fullmatch(node.value):
                file = folder / node.value
                if file.is_file():
                    yield hashlib.sha256(file.read_bytes()).hexdigest()

    def _path(self, module: str) -> Path:
        path = self._package.joinpath(*module.split(".")[1:])
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _module(self, name: str) -> Module | None:
        """A module of the package, parsed; None for one that is not there."""
        if name not in self._modules:
            path = self._path(name)
            inside = name.split(".")[0] == "helpsteer_assets" and path.is_file()
            self._modules[name] = self._parsed(ast.parse(path.read_bytes())) if inside else None
        return self._modules[name]

    def _parsed(self, tree: ast.Module) -> Module:
        module = Module(definitions={"": []})
        for statement in tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                module.imports |= self._imported(statement)
            elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
                continue
            elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                module.definitions.setdefault(statement.name, []).append(statement)
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                names = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
                for name in names:
                    module.definitions.setdefault(name, []).append(statement)
            elif not _is_text(statement):
                module.definitions[""].append(statement)
        return module

    def _imported(self, statement: ast.Import | ast.ImportFrom) -> dict[str, Definition]:
        """The definitions that an import binds; `*` stands for all of a module."""
        if isinstance(statement, ast.Import):
            return {alias.asname: (alias.name, "*") for alias in statement.names if alias.asname}
        bound: dict[str, Definition] = {}
        for alias in statement.names:
            submodule = f"{statement.module}.{alias.name}"
            is_module = self._module(submodule) is not None
            bound[alias.asname or alias.name] = (submodule, "*") if is_module else (statement.module or "", alias.name)
        return bound

    def _references(self, name: str, module: Module, statement: ast.stmt) -> Iterator[Definition]:
        bound = dict(module.imports)
        for node in _walk(statement):
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound |= self._imported(node)
        own = _own_names(statement) if isinstance(statement, ast.FunctionDef) else set()
        for node in _walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                target = bound.get(node.value.id)
                if target is not None and target[1] == "*":
                    yield target[0], node.attr
            elif isinstance(node, ast.Name) and node.id not in own:
                target = bound.get(node.id, (name, node.id))
                if target[1] != "*":
                    yield target


def _own_names(function: ast.FunctionDef) -> set[str]:
    """Parameters and variables of a function, which may bear the name of a definition: those of a stage do."""
    stored = {node.id for node in _walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.arg for node in _walk(function) if isinstance(node, ast.arg)}


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it that computes: no annotations, and no `@stage`, which declares."""
    yield node
    for part, value in ast.iter_fields(node):
        if part in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not (part == "decorator_list" and _declares(child)):
                yield from _walk(child)


def _declares(decorator: ast.AST) -> bool:
    return isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "stage"


def _plain(node: Any) -> Any:
    """The tree as lists, without what computes nothing and without empty fields, which differ between Pythons."""
    if isinstance(node, list):
        return [_plain(item) for item in node if not (_is_text(item) or _declares(item))]
    if isinstance(node, ast.AST):
        return [
            type(node).__name__,
            {
                name: _plain(value)
                for name, value in ast.iter_fields(node)
                if value not in (None, []) and name not in ("annotation", "returns")
            },
        ]
    return repr(node)


def _is_text(node: Any) -> bool:
    """Whether a statement is a docstring, of an attribute too, or an import."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return isinstance(node, ast.Import | ast.ImportFrom)


def main() -> None:
    """Store the present digests."""
    STORED.write_text(json.dumps(Code().stage_digests(), indent=2) + "\n", encoding="utf-8")
    print(f"{len(STAGES)} digests in {STORED}")


if __name__ == "__main__":
    main()

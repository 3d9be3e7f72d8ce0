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

    definitions: dict[str, list[ast.stmt]] = field(default_factory=lambda: {"": []})
    imports: dict[str, Definition] = field(default_factory=dict)


class Code:
    """The source of a package."""

    def __init__(self, package: Path = PACKAGE) -> None:
        self._package = package
        self._modules: dict[str, Module | None] = {}

    def stage_digests(self) -> dict[str, str]:
        """The digest of each stage's code, by stage."""
        return {stage.name: self._digest((stage.compute.__module__, stage.name)) for stage in STAGES}

    def _digest(self, root: Definition) -> str:
        """SHA-256 over all that a definition reaches."""
        reached: dict[Definition, str] = {}
        waiting = [root, *SURROUNDINGS]
        while waiting:
            module_name, name = definition = waiting.pop()
            module = self._module(module_name)
            if definition in reached or module is None:
                continue
            if name in module.imports and name not in module.definitions:
                waiting.append(module.imports[name])  # passed on by another module
            elif name == "*":
                waiting += [(module_name, each) for each in module.definitions]
            elif name in module.definitions:
                statements = module.definitions[name]
                reached[definition] = "".join(self._content(module_name, statement) for statement in statements)
                waiting.append((module_name, ""))
                for statement in statements:
                    waiting += self._references(module_name, module, statement)
        pieces = sorted(f"{name} {content}" for (_, name), content in reached.items())
        return hashlib.sha256("\n".join(pieces).encode()).hexdigest()[:16]

    def _content(self, module: str, statement: ast.stmt) -> str:
        """The statement without its imports, and the digests of the files that it names."""
        texts = {n.value for n in ast.walk(statement) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        files = [self._path(module).parent / text for text in sorted(texts) if FILE_NAME.fullmatch(text)]
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
        return repr([_plain(statement), digests])

    def _path(self, module: str) -> Path:
        path = self._package.joinpath(*module.split(".")[1:])
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _module(self, name: str) -> Module | None:
        """A module of the package, parsed; None for one that is not there."""
        if name not in self._modules:
            path = self._path(name)
            inside = name.split(".")[0] == "helpsteer_assets" and path.is_file()
            self._modules[name] = self._parsed(_Bare().visit(ast.parse(path.read_bytes()))) if inside else None
        return self._modules[name]

    def _parsed(self, tree: ast.Module) -> Module:
        module = Module()
        for statement in tree.body:
            names = [""]
            if isinstance(statement, ast.Import | ast.ImportFrom):
                module.imports |= self._imported(statement)
                continue
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = [statement.name]
            elif isinstance(statement, ast.Assign):
                names = [n.id for target in statement.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            for name in names:
                module.definitions.setdefault(name, []).append(statement)
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
        nodes, bound, own = list(ast.walk(statement)), dict(module.imports), set()
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound |= self._imported(node)
            elif isinstance(statement, ast.FunctionDef) and isinstance(node, ast.arg):
                own.add(node.arg)  # a parameter or variable may bear the name of a definition: those of a stage do
            elif isinstance(statement, ast.FunctionDef) and isinstance(node, ast.Name):
                own |= {node.id} if isinstance(node.ctx, ast.Store) else set()
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                target = bound.get(node.value.id)
                if target is not None and target[1] == "*":
                    yield target[0], node.attr
            elif isinstance(node, ast.Name) and node.id not in own:
                target = bound.get(node.id, (name, node.id))
                if target[1] != "*":
                    yield target


class _Bare(ast.NodeTransformer):
    """Leaves out what computes nothing: docstrings, annotations, `@stage`, and what is for type checkers."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)  # type: ignore[return-value]

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        value = self.visit(node.value) if node.value else ast.Constant(...)
        return ast.copy_location(ast.Assign([node.target], value), node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        node.decorator_list = [each for each in node.decorator_list if not ast.unparse(each).startswith("stage(")]
        return self.generic_visit(node)


def _plain(node: Any) -> Any:
    """The tree as lists, without imports and without empty fields, which differ between Pythons."""
    if isinstance(node, list):
        return [_plain(item) for item in node if not isinstance(item, ast.Import | ast.ImportFrom)]
    if isinstance(node, ast.AST):
        fields = {name: _plain(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
        return [type(node).__name__, fields]
    return repr(node)


def main() -> None:
    """Store the present digests."""
    STORED.write_text(json.dumps(Code().stage_digests(), indent=2) + "\n", encoding="utf-8")
    print(f"{len(STAGES)} digests in {STORED}")


if __name__ == "__main__":
    main()

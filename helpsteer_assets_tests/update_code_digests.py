"""Digests of the code that determines results, and the command that refreshes them.

    python -m helpsteer_assets_tests.update_code_digests

A piece of `stages.CODE_VERSIONS` is a module, or a function of one (`module.py:function`) with all that it uses of its
module. Its digest covers what the code does: comments, docstrings, imports and layout do not count.
"""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import helpsteer_assets
from helpsteer_assets.assets.graph import CODE_VERSIONS

PACKAGE = Path(helpsteer_assets.__file__).parent
STORED = Path(__file__).with_name("code_digests.json")


def piece_digest(piece: str, package: Path = PACKAGE) -> str:
    """16 hex digits that change once the piece's code does."""
    file, _, function = piece.partition(":")
    text = (package / file).read_text(encoding="utf-8")
    if not file.endswith(".py"):
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    tree = ast.parse(text)
    nodes: list[ast.stmt] = _used_by(function, tree) if function else tree.body
    return hashlib.sha256(json.dumps(_plain(nodes)).encode()).hexdigest()[:16]


def _used_by(function: str, tree: ast.Module) -> list[ast.stmt]:
    """The function and what it uses, directly or not, of its module's own functions, classes and constants."""
    defined: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    used, waiting = set(), [function]
    while waiting:
        name = waiting.pop()
        if name in defined and name not in used:
            used.add(name)
            waiting += [node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)]
    if function not in used:
        raise KeyError(f"there is no function {function}")
    return [node for name, node in defined.items() if name in used]


def _plain(node: Any) -> Any:
    """The tree as lists, without what computes nothing and without empty fields, which differ between Pythons."""
    if isinstance(node, list):
        return [_plain(item) for item in node if not _computes_nothing(item)]
    if isinstance(node, ast.AST):
        fields = {name: _plain(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
        return [type(node).__name__, fields]
    return repr(node)


def _computes_nothing(node: Any) -> bool:
    if isinstance(node, ast.Expr):  # a docstring, of an attribute too
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return isinstance(node, ast.Import | ast.ImportFrom)


def main() -> None:
    """Store the present digest of every piece."""
    digests = {piece: piece_digest(piece) for piece in CODE_VERSIONS}
    STORED.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    print(f"{len(digests)} digests in {STORED}")


if __name__ == "__main__":
    main()

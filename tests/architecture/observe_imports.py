"""Imports modules of ROOT and prints, as JSON, what the imports did: `observe_imports.py ROOT PACKAGE...`.

Runs in a process of its own, because what it looks for happens once a process. `loaded` lists the top-level modules
that are in memory afterwards; `effects` holds a sentence for each change that an import of ours made. Third parties
change things as well, and that is theirs: the import statements at the top of our modules run first, on their own.
`missing` names the modules of ours that need an optional third party which is not installed.
"""

import ast
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

OPTIONAL = ("torch", "vllm")


def main(root: Path, packages: list[str], with_effects: bool) -> None:
    """Imports every module of the packages, and prints what was seen."""
    sys.path.insert(0, str(root))
    files = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    files = [path for path in files if path.name != "__main__.py"]
    effects: list[str] = []
    missing: list[str] = []
    if with_effects:
        for statement in sorted({line for path in files for line in third_party_imports(path, packages)}):
            try:
                exec(statement, {})
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] not in OPTIONAL:
                    raise
        import jax  # noqa: F401  the state that is compared is read from it
    before = state() if with_effects else {}
    for path in files:
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in OPTIONAL:
                raise
            missing.append(module)
        if with_effects:
            after = state()
            changed = sorted(key for key in before | after if before.get(key) != after.get(key))
            effects += [f"import {module}: {key} went from {before.get(key)} to {after.get(key)}" for key in changed]
            before = after
    loaded = sorted({name.split(".")[0] for name in sys.modules})
    print(json.dumps({"loaded": loaded, "effects": effects, "missing": missing}))


def third_party_imports(path: Path, packages: list[str]) -> Iterator[str]:
    """The import statements that run when the module at `path` is imported, but for those of our own packages."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            is_relative = isinstance(node, ast.ImportFrom) and node.level > 0
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if not is_relative and not any(name.split(".")[0] in {*packages, "__future__"} for name in names):
                yield ast.unparse(node)
        pending.extend(ast.iter_child_nodes(node))


def state() -> dict[str, str]:
    """What an import must not change: environment variables, JAX's configuration, and whether JAX took its devices."""
    import jax
    from jax._src import xla_bridge

    seen = {f"environment variable {name}": value for name, value in os.environ.items()}
    seen |= {f"JAX's setting {name}": repr(value) for name, value in jax.config.values.items()}
    seen["JAX's devices taken"] = str(xla_bridge.backends_are_initialized())
    return seen


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:], with_effects=sys.argv[2] == "effects")

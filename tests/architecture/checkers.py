"""The house rules as functions over a folder, so that tests can plant violations in a folder too.

Each checker returns the violations that it found, one sentence each, and an empty list where there are none.
"""

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# What each package may import of the others. Nothing else of the repository is importable from a package.
MAY_IMPORT = {
    "recipes": frozenset[str](),
    "models": frozenset({"recipes"}),
    "pretrain": frozenset({"recipes", "models"}),
    "rewards": frozenset[str](),
    "posttrain": frozenset({"recipes", "models", "pretrain", "rewards"}),
}
PACKAGES = tuple(MAY_IMPORT)
# Code that is not shipped: it may import every package, and every third party.
BESIDE = ("tests", "bench", ".ci")
TOP_LEVEL_FOLDERS = frozenset({*PACKAGES, "tests", "bench", "notebooks"})
# What builds and runs leave behind; git ignores these.
LEFT_BEHIND = re.compile(r"build|dist|runs|wandb|__pycache__|.*\.egg-info")
VAGUE_NAMES = frozenset({"common", "core", "utils"})

# A third party, and the only places that may import it.
DOORS = {
    "tunix": ("posttrain/trainers/", "posttrain/samplers/rollout.py"),
    "vllm": ("posttrain/samplers/vllm.py",),
    "orbax": ("models/checkpoints/",),
    "torch": ("posttrain/samplers/vllm.py",),
    "safetensors.torch": (),
}
# A package, and what may not enter it.
KEPT_OUT = {
    "recipes": ("jax", "jaxlib", "flax", "optax", "qwix", "transformers"),
    "rewards": ("jax", "jaxlib", "flax"),
}

FILE_LINES = 500
FUNCTION_LINES = 80
INIT_LINES = 30


@dataclass(frozen=True)
class Import:
    """One imported module, written out in full, and where it is imported."""

    path: str
    line: int
    module: str | None  # None where the name is computed, so that no reader can tell

    @property
    def where(self) -> str:
        """The place, as `file:line`."""
        return f"{self.path}:{self.line}"

    def is_of(self, package: str) -> bool:
        """Whether the module is `package` or lies in it."""
        return self.module is not None and (self.module == package or self.module.startswith(package + "."))


@dataclass(frozen=True)
class Allowance:
    """An exception to a size: the lines that are granted, and why."""

    lines: int
    reason: str


def python_files(root: Path, folders: Iterable[str]) -> list[Path]:
    """Every Python file in those folders of `root`, in order."""
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def package_imports(root: Path) -> list[Import]:
    """Every import of every package: in functions and under TYPE_CHECKING too, and by `importlib`."""
    return [found for path in python_files(root, PACKAGES) for found in _imports_of(path, root)]


def _imports_of(path: Path, root: Path) -> Iterator[Import]:
    relative = path.relative_to(root)
    # The package against which a relative import is read: the folder, for a module and for an `__init__` alike.
    package = relative.parent.parts
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        modules: list[str | None] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from a import b` may import the module a.b.
            modules = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            # Under another name, its calls could not be told from any other's.
            modules += [None for alias in node.names if alias.name == "import_module" and alias.asname]
        elif isinstance(node, ast.Call) and _called_name(node) in {"import_module", "__import__"}:
            first = node.args[0] if node.args else None
            literal = isinstance(first, ast.Constant) and isinstance(first.value, str)
            modules = [first.value if literal else None]
        for module in modules:
            yield Import(str(relative), node.lineno, module)


def _called_name(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def check_arrows(root: Path) -> list[str]:
    """recipes <- models <- pretrain <- posttrain, and rewards <- posttrain."""
    violations = []
    for found in package_imports(root):
        if found.module is None:
            violations.append(f"{found.where}: the imported module's name is computed; write it out, so it can be read")
            continue
        importer, imported = found.path.split("/")[0], found.module.split(".")[0]
        if imported in BESIDE:
            violations.append(f"{found.where}: {importer} imports {imported}, which is not shipped")
        elif imported in PACKAGES and imported != importer and imported not in MAY_IMPORT[importer]:
            allowed = ", ".join(sorted(MAY_IMPORT[importer])) or "none of the other packages"
            violations.append(f"{found.where}: {importer} imports {found.module}; it may import {allowed}")
    return violations


def check_doors(root: Path) -> list[str]:
    """Third parties that enter through one door each."""
    return [
        f"{found.where}: imports {found.module}; {party} enters through {' and '.join(doors) or 'tests'} alone"
        for found in package_imports(root)
        for party, doors in DOORS.items()
        if found.is_of(party) and not found.path.startswith(doors)
    ]


def check_kept_out(root: Path) -> list[str]:
    """Third parties that a whole package must do without."""
    return [
        f"{found.where}: imports {found.module}; {party} may not enter {package}/"
        for found in package_imports(root)
        for package, parties in KEPT_OUT.items()
        for party in parties
        if found.path.startswith(f"{package}/") and found.is_of(party)
    ]


def check_folders(root: Path) -> list[str]:
    """The top-level folders are fixed, and nothing is called common, core or utils."""
    folders = [path.name for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    violations = [
        f"{name}/: the top-level folders are fixed; put it into one of them"
        for name in folders
        if name not in TOP_LEVEL_FOLDERS and not LEFT_BEHIND.fullmatch(name)
    ]
    files = python_files(root, [*PACKAGES, *BESIDE])
    names = {part for path in files for part in _paths_up_to(path.relative_to(root).with_suffix(""))}
    vague = sorted(str(path) for path in names if path.name in VAGUE_NAMES)
    return violations + [f"{path}: a shared thing lives in the lowest package whose words it needs" for path in vague]


def _paths_up_to(path: Path) -> list[Path]:
    return [path, *path.parents]


def check_sizes(root: Path, allowances: Mapping[str, Allowance]) -> list[str]:
    """Lines of files, functions and `__init__` methods; an allowance that is no longer needed must go.

    Allowances are keyed by `path` for a file, and `path::Class.function` for a function.
    """
    over = {key: (lines, limit) for key, lines, limit in _sizes(root) if lines > limit}
    violations = []
    for key, (lines, limit) in over.items():
        granted = allowances[key].lines if key in allowances else limit
        if lines > granted:
            violations.append(f"{key}: {lines} lines; the limit is {granted}; split it")
    for key in allowances.keys() - over.keys():
        violations.append(f"{key}: within the limit or gone; remove its allowance")
    return violations


def _sizes(root: Path) -> Iterator[tuple[str, int, int]]:
    for path in python_files(root, [*PACKAGES, *BESIDE]):
        name, text = str(path.relative_to(root)), path.read_text()
        yield name, len(text.splitlines()), FILE_LINES
        for qualified, node in _functions(ast.parse(text), ()):
            limit = INIT_LINES if node.name == "__init__" else FUNCTION_LINES
            yield f"{name}::{qualified}", (node.end_lineno or 0) - node.lineno + 1, limit


def _functions(parent: ast.AST, outer: tuple[str, ...]) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(parent):
        inner = outer
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = (*outer, node.name)
            if not isinstance(node, ast.ClassDef):
                yield ".".join(inner), node
        yield from _functions(node, inner)


# Folders that exist on somebody's machine only. The lookbehind leaves web addresses and relative paths alone.
MACHINE_PATH = re.compile(r"(?<![\w.\-])/(?:root|home|Users|work|mnt|opt)/[\w.\-]+|file:/{3}")
REGISTRY_ADDRESS = re.compile(r"https?://[^\s\"'<>]*/simple\b|files\.pythonhosted\.org")
ADDRESS_IN_PINS = re.compile(
    r"^\s*(?:-i\b|-f\b|--(?:extra-)?index-url|--index\b|--find-links|--trusted-host)|://|--hash"
)
LOCK_FILE = re.compile(r"(?:uv|poetry|pdm|Pipfile|package-lock|yarn)\.(?:lock|json)")


def published_files(root: Path) -> list[Path]:
    """What git tracks in `root` and the working tree still has; in a copy without git, all but what is left behind."""
    if not (root / ".git").exists():
        paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
        return [path for path in paths if not any(_is_left_behind(part) for part in path.relative_to(root).parts[:-1])]
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    paths = [root / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def _is_left_behind(folder: str) -> bool:
    return bool(LEFT_BEHIND.fullmatch(folder)) or (folder.startswith(".") and folder != ".ci")


def check_prose(root: Path, files: Iterable[Path]) -> list[str]:
    """No path of one machine, no address of a package registry, no lock file (which holds such addresses)."""
    violations = []
    for path in files:
        name = str(path.relative_to(root))
        if LOCK_FILE.fullmatch(path.name):
            violations.append(f"{name}: lock files hold addresses of registries; pin in requirement files")
            continue
        content = path.read_bytes()
        if b"\0" in content:
            continue
        is_pins = path.name.startswith("requirements") and path.suffix == ".txt"
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if found := MACHINE_PATH.search(line) or (str(root) in line and re.search(re.escape(str(root)), line)):
                violations.append(f"{name}:{number}: {found[0]}: a path of one machine; name it relative to something")
            if REGISTRY_ADDRESS.search(line):
                violations.append(f"{name}:{number}: an address of a package registry; say it in words")
            if is_pins and ADDRESS_IN_PINS.search(line):
                violations.append(f"{name}:{number}: requirement files hold names and versions only")
    return violations

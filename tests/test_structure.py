"""The order of the rooms: whatever a file of mend_jax imports stands above it in docs/structure.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mend_jax"


def listed():
    """{module: its row} of the table."""
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "structure.md").read_text(), re.MULTILINE)
    order = {}
    for number, row in enumerate(rows):
        for file in re.findall(r"`(.+?)`", row):
            assert module_of(file) not in order, f"{file} stands twice in docs/structure.md"
            order[module_of(file)] = number
    return order


def module_of(file):
    parts = (PACKAGE, *Path(file).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def sources():
    """{module: its source} of every file with more in it than a docstring; an exported folder is what the house makes."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if path.is_relative_to(ROOT / PACKAGE / "distillers"):
            continue
        text = path.read_text()
        if any(not isinstance(node, ast.Expr) for node in ast.parse(text).body):
            found[module_of(path.relative_to(ROOT / PACKAGE))] = text
    return found


def imports(text, modules):
    """(line, module of ours) of every import wherever it stands; what cannot be told by reading counts as the package."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [PACKAGE] if node.level else [name if name in modules else node.module for name in inside]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [PACKAGE]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == PACKAGE)


def upward(found, order):
    """The imports of {module: source} that go to the same row or to one below."""
    return [
        f"{module}, line {line}: {name}"
        for module, text in found.items()
        for line, name in imports(text, order)
        if name != module and order[name] >= order[module]
    ]


def test_every_file_has_its_place():
    assert sorted(listed()) == sorted(sources())


def test_rooms_import_only_from_rooms_above():
    assert upward(sources(), listed()) == []


@pytest.mark.parametrize(
    "text",
    [
        "from mend_jax.export import export",
        "from mend_jax import export",
        "import mend_jax.export",
        "import mend_jax.export as other",
        "def f():\n    from mend_jax.export import export",
        "class A:\n    def f(self):\n        if True:\n            import mend_jax.export",
        "import mend_jax",
        "from mend_jax import load_llm",
        "from . import export",
        "import importlib\nimportlib.import_module('mend_jax.export')",
        "from mend_jax.evaluate import main",
    ],
)
def test_an_import_from_below_is_seen(text):
    order = {
        "mend_jax.prefixes.prefix": 0,
        "mend_jax.train": 1,
        "mend_jax.evaluate": 1,
        "mend_jax.export": 2,
        "mend_jax": 3,
    }
    assert len(upward({"mend_jax.train": text}, order)) == 1
    assert upward({"mend_jax.train": "from mend_jax.prefixes.prefix import Prefix\nimport jax"}, order) == []


def test_every_check_stands_in_the_list():
    """run/checks.py names all that is verified before work starts; what measures, checks its own arguments."""
    everything = sources()
    named = everything["mend_jax.run.checks"]
    found = {
        (module, name)
        for module, text in everything.items()
        for name in re.findall(r"^def (check_\w+)", text, re.MULTILINE)
        if not module.startswith((f"{PACKAGE}.measure", f"{PACKAGE}.cli"))
    }
    assert len(found) > 15
    assert not {(module, name) for module, name in found if not re.search(rf"\b{name}\b", named)}

"""One direction of imports: the table below is the rule, and every file is held to it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("server", "adapters", "training", "loadtest", "deploy", "tests")

# What every layer of the server may use; they use nothing of ours themselves.
SHARED = ("server.base_digest", "server.config", "server.errors", "server.versions")

# A module belongs to the longest name here that it starts with, and may import that layer and
# those on the right. A module that no name covers fails the test: give it a row.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "server.api": ("server.engine", "server.metrics", "server.promotion", "adapters", *SHARED),
    "server.engine": ("server.model", "server.kernels", "adapters", *SHARED),
    "server.model": ("server.kernels", "server.quant", *SHARED),
    "server.kernels": ("server.quant",),
    "server.quant": (),
    "server.promotion": ("adapters", *SHARED),
    "server.config": (),
    "server.errors": (),
    "server.versions": (),
    "server.start_display": (),
    "server.metrics": ("server.engine",),  # the structs it counts; the engine never sees it
    "server.default_base": ("server.config",),
    "server.base_digest": (),
    "server.adapter_admin": ("adapters", *SHARED),
    "server.cli_options": ("server.default_base", *SHARED),
    "server.adapters_cli": (
        "server.adapter_admin",
        "server.base_text",
        "server.cli_options",
        *SHARED,
    ),
    "server.base_text": ("server.api", "adapters", *SHARED),
    "server.promote_admin": ("server.adapter_admin", "server.promotion", "adapters", *SHARED),
    "server.promote_cli": (
        "server.promote_admin",
        "server.adapter_admin",
        "server.adapters_cli",
        "server.cli_options",
        "adapters",
        *SHARED,
    ),
    "server.training_cli": (
        "server.adapters_cli",
        "server.cli_options",
        "server.default_base",
        "training",
        *SHARED,
    ),
    "server.bench_cli": ("server.bench", "server.cli_options", *SHARED),
    "server.doctor": ("server.engine", "server.model", "server.kernels", *SHARED),
    "server.bench": ("server.engine", "server.model", "server.adapter_admin", "adapters", *SHARED),
    "server.__main__": (
        "server.api",
        "server.engine",
        "server.default_base",
        "server.adapter_admin",
        "server.base_text",
        "server.metrics",
        "server.start_display",
        "adapters",
        *SHARED,
    ),
    "server.cli": (
        "server.__main__",
        "server.adapters_cli",
        "server.bench_cli",
        "server.promote_cli",
        "server.training_cli",
        "server.cli_options",
        "server.api",
        "server.doctor",
        "loadtest",
        *SHARED,
    ),
    "adapters": (),
    "deploy": (),
    "training": ("adapters", "server.quant", "server.base_digest", "server.versions"),
    "loadtest": (),
}

# Modules that may import inside a function, and why.
LATE_IMPORTS = {
    "server.cli": "one subcommand's module each, so that --help loads no torch",
    "server.adapters_cli": "a push alone needs a tokenizer",
    "server.bench_cli": "as server.cli",
    "server.training_cli": "as server.cli",
}

# Packages that a layer does without, and why.
BANNED: dict[str, tuple[tuple[str, ...], str]] = {
    "server.api": (("torch", "peft", "bitsandbytes"), "no tensors in the API process"),
    "server.kernels": (("transformers", "peft"), "an op knows no model"),
    "server.engine": (("starlette", "uvicorn", "httpx"), "the engine knows no HTTP"),
    "loadtest": (("torch", "transformers"), "it speaks HTTP only"),
}


def sources() -> list[Path]:
    """Every Python file of ours outside tests; `__init__.py` files are empty and left out."""
    files = [path for top in OURS[:-1] for path in sorted((ROOT / top).rglob("*.py"))]
    return [path for path in files if path.name != "__init__.py"]


def module_name(path: Path) -> str:
    """server/engine/engine.py -> server.engine.engine"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def covers(layer: str, module: str) -> bool:
    """Whether `module` is `layer` or inside it."""
    return module == layer or module.startswith(layer + ".")


def layer_of(module: str) -> str | None:
    """The row of the table that a module belongs to."""
    return max((layer for layer in MAY_IMPORT if covers(layer, module)), key=len, default=None)


def imported(node: ast.AST) -> Iterator[str]:
    """The absolute names a statement imports: `from a import b` counts as a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import"
        assert node.module is not None
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """What one module's imports break, a line each."""
    layer = layer_of(module)
    if layer is None:
        return [f"{module} is in no layer of the table"]
    allowed = (layer, *MAY_IMPORT[layer])
    banned, reason = BANNED.get(layer, ((), ""))
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in imported(node):
            where = f"{module}:{getattr(node, 'lineno', 0)} imports {name}"
            top = name.split(".")[0]
            if top in OURS and not any(covers(layer, name) for layer in allowed):
                found.append(f"{where}, which {layer} may not")
            if top in banned:
                found.append(f"{where}: {reason}")
    return found


def late_imports(module: str, source: str) -> list[str]:
    """Imports inside a function or a class body."""
    if module in LATE_IMPORTS:
        return []
    scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    return sorted(
        {
            f"{module}:{node.lineno} imports inside {getattr(scope, 'name', 'a lambda')}"
            for scope in ast.walk(ast.parse(source))
            if isinstance(scope, scopes)
            for node in ast.walk(scope)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
    )


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_stand_at_the_top_of_the_file(path: Path) -> None:
    assert late_imports(module_name(path), path.read_text(encoding="utf-8")) == []


def test_package_files_are_empty() -> None:
    files = [path for top in OURS for path in (ROOT / top).rglob("__init__.py")]
    assert len(files) > 5
    assert [path for path in files if path.stat().st_size] == []


def test_test_folders_hold_no_package_files() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_table_has_no_cycle_between_layers() -> None:
    settled: set[str] = set()
    while len(settled) < len(MAY_IMPORT):
        ready = {
            layer
            for layer, allowed in MAY_IMPORT.items()
            if layer not in settled and {name for name in allowed if name in MAY_IMPORT} <= settled
        }
        assert ready, f"a cycle among {sorted(set(MAY_IMPORT) - settled)}"
        settled |= ready


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("server.kernels.lora", "from server.engine import engine", "may not"),
        ("server.kernels.lora", "import server.engine.engine", "may not"),
        ("server.api.chat", "import server.model.decoder", "may not"),
        ("adapters.store", "from server.errors import ServeError", "may not"),
        ("training.qlora", "from server import config", "may not"),
        ("server.engine.engine", "def f():\n    from server.api import chat", "may not"),
        ("server.quantity", "import json", "in no layer"),
        ("server.api.chat", "import torch", "no tensors"),
        ("server.engine.process", "from starlette.requests import Request", "no HTTP"),
    ],
)
def test_the_checker_sees_a_wrong_import(module: str, source: str, complaint: str) -> None:
    (found,) = violations(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("server.api.chat", "from server.engine.client import EngineClient"),
        ("server.model.linear", "from server.quant import nf4"),
        ("server.engine.engine", "import torch\nfrom server.config import CacheConfig"),
        ("training.merge", "import adapters.manifest"),
    ],
)
def test_the_checker_lets_a_right_import_pass(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_the_checker_sees_an_import_inside_a_function() -> None:
    source = "def outer():\n    def inner():\n        import json\n"
    assert late_imports("server.engine.engine", source)
    assert not late_imports("server.cli", source)
    assert not late_imports(
        "server.engine.engine", "try:\n    import triton\nexcept ImportError:\n    pass"
    )

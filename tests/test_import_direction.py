"""Who may import whom.

config ← params, sharding ← nn ← encoders, connectors ← models ← train_step ← train, generate;
`data` beside them, knowing neither arrays nor models.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from unimoe_jax.sharding import MESH_AXES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unimoe_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own level (the layer of its first matching pattern) and below.
LEVELS = (
    r"module_config|model_config|config|config_io|config_yaml|config_schema|metric_series",
    r"params|sharding|distributed|processes|integrity|disk",
    r"nn(/.*)?",
    r"encoders(/.*)?|connectors(/.*)?",
    r"lora|upcycle|losses|optim",
    r"models(/.*)?",
    r"checkpoint|train_step",
)
TREES = ("losses", "optim", "lora", "upcycle")
PLACES = (
    "PartitionSpec|P|Mesh|NamedSharding|make_mesh|all_gather|all_to_all|axis_index|"
    "psum|psum_scatter|pmean|pmax|ppermute"
)
PURE = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers"}


def name_of(path: Path) -> str:
    """unimoe_jax/nn/linear.py -> nn/linear; a package's __init__ stands for the package."""
    name = str(path.relative_to(PACKAGE).with_suffix(""))
    return name.removesuffix("/__init__").removesuffix("__init__")


def imports(path: Path) -> set[str]:
    """Full dotted names of everything imported anywhere in the file, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(path: Path) -> set[str]:
    """Names (as by `name_of`) of this package's modules that the file imports."""
    known = {name_of(file) for file in FILES}
    found = set()
    for name in imports(path):
        if name.split(".")[0] == "unimoe_jax":
            name = name.removeprefix("unimoe_jax").removeprefix(".").replace(".", "/")
            # `a/b` is a module, or a name of module `a`.
            found.add(name if name in known else name.rpartition("/")[0])
    return {name for name in found if name in known and name}


def level(name: str) -> int:
    matching = (n for n, pattern in enumerate(LEVELS) if re.fullmatch(pattern, name))
    return next(matching, len(LEVELS))


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path):
    name = name_of(path)
    if name.startswith(("data", "convert")):
        return  # beside the levels: see below
    allowed_data = {"data/batch"} if level(name) < len(LEVELS) else None
    for other in own_modules(path):
        if other.startswith("data"):
            assert allowed_data is None or other in allowed_data | {"data"}, f"{name} -> {other}"
        elif not other.startswith("convert"):
            assert level(other) <= level(name), f"{name} -> {other}"
        else:
            assert level(name) == len(LEVELS), f"{name} -> {other}"


def test_there_are_no_cycles():
    graph = {name_of(path): own_modules(path) - {name_of(path)} for path in FILES}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, others in graph.items() if name not in done and others <= done}
        assert ready, f"import each other: {sorted(set(graph) - done)}"
        done |= ready


def test_layers_know_neither_runs_nor_stages():
    """They receive plain fields or their own part of the settings."""
    for path in FILES:
        if level(name_of(path)) in (2, 3, 5):
            for name in ("RunConfig", "StageConfig", "DataConfig"):
                assert f"unimoe_jax.config.{name}" not in imports(path), f"{path} -> {name}"


def test_data_know_neither_arrays_nor_models():
    for path in FILES:
        if name_of(path).startswith("data"):
            assert not tops(path) & (PURE - {"transformers"}), path
            others = {other for other in own_modules(path) if not other.startswith("data")}
            assert others <= {"config"}, f"{path} -> {others}"


def test_trees_in_trees_out():
    """These four import no module of the program's."""
    for name in TREES:
        others = own_modules(PACKAGE / f"{name}.py")
        assert all(level(other) < level(name) for other in others), f"{name} -> {others}"


def test_torch_stays_in_conversion_and_parity():
    """Benchmarks may run it beside us; nothing that ships or is tested elsewhere needs it."""
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        if not re.match(r"unimoe_jax/convert/|tests/parity/", str(path.relative_to(ROOT))):
            assert "torch" not in tops(path), path


def test_safetensors_is_imported_once():
    """Its writer corrupts arrays that are not contiguous, so that one module wraps it."""
    users = {name_of(path) for path in FILES if "safetensors" in tops(path)}
    assert len(users) <= 1, users


def test_mesh_axes_are_named_in_one_place():
    """As string constants, `data` aside, which is an ordinary word; `expert` and `tensor` are
    logical axes too, hence: no PartitionSpec or Mesh of literals, no collective over a literal."""
    for path in FILES:
        if name_of(path) == "sharding":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if not re.fullmatch(PLACES, function):
                continue
            literals = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert not literals & set(MESH_AXES), f"{path}:{node.lineno} names a mesh axis"
        text = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert "fsdp" not in text, f"{path} names the mesh axis fsdp"

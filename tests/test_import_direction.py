"""Who may import whom: every package has a level, and imports only from the levels below its own.

The same table is in CONTRIBUTING.md. A new package needs a line in `LEVELS`, or tests fail.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from unimoe_jax.parallel.sharding import MESH_AXES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "unimoe_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up. Packages on one level do not import each other.
LEVELS = (
    ("config", "runtime"),
    ("data", "parallel", "metrics"),
    ("nn",),
    ("encoders", "connectors", "params"),
    ("models", "checkpoints"),
    ("convert", "generate", "stages", "report"),
    ("evaluate", "experts", "compile", "doctor"),
    ("train",),
    ("cli",),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}

# Packages that import less than their level allows.
ONLY = {
    "config": set(),
    "runtime": set(),
    "data": {"config"},
    "report": {"metrics", "config", "runtime", "checkpoints"},
    "doctor": {"config", "runtime", "parallel"},
}
LIBRARIES_BELOW_SETTINGS = ("nn", "encoders", "connectors", "models")
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers"}
TAKES_MESH_AXES = (
    "PartitionSpec|P|Mesh|NamedSharding|make_mesh|all_gather|all_to_all|axis_index|"
    "psum|psum_scatter|pmean|pmax|ppermute"
)


def name_of(path: Path) -> str:
    """unimoe_jax/nn/linear.py -> nn/linear; a package's __init__ stands for the package."""
    name = str(path.relative_to(PACKAGE).with_suffix(""))
    return name.removesuffix("/__init__").removesuffix("__init__")


def package_of(name: str) -> str:
    """nn/moe/layer -> nn."""
    return name.split("/")[0]


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


KNOWN = {name_of(file) for file in FILES}


def own_modules(path: Path) -> set[str]:
    """Names (as by `name_of`) of this package's modules that the file imports."""
    found = set()
    for name in imports(path):
        if name.split(".")[0] == "unimoe_jax":
            name = name.removeprefix("unimoe_jax").removeprefix(".").replace(".", "/")
            # `a/b` is a module, or a name of module `a`.
            found.add(name if name in KNOWN else name.rpartition("/")[0])
    return {name for name in found if name in KNOWN and name}


def frameworks(path: Path) -> set[str]:
    """Top-level names of everything that the file imports."""
    return {name.split(".")[0] for name in imports(path)}


def files_of(*packages: str) -> list[Path]:
    return [path for path in FILES if package_of(name_of(path)) in packages]


def test_the_root_holds_folders_only():
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_every_package_has_a_level_and_a_map():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(LEVEL), f"without a level: {sorted(folders - set(LEVEL))}"
    for path in PACKAGE.rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p)], ids=name_of)
def test_imports_point_down(path: Path):
    package = package_of(name_of(path))
    others = {package_of(name) for name in own_modules(path)} - {package}
    for other in others:
        assert LEVEL[other] < LEVEL[package], f"{name_of(path)} imports {other}"
    assert others <= ONLY.get(package, others), f"{name_of(path)} imports {others}"


def test_there_are_no_cycles():
    graph = {name_of(path): own_modules(path) - {name_of(path)} for path in FILES}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, others in graph.items() if name not in done and others <= done}
        assert ready, f"import each other: {sorted(set(graph) - done)}"
        done |= ready


def test_layers_know_neither_runs_nor_stages():
    """Layers receive plain fields or their own part of the settings."""
    for path in files_of(*LIBRARIES_BELOW_SETTINGS):
        names = {name.rpartition(".")[2] for name in imports(path)}
        assert not names & {"RunConfig", "StageConfig", "DataConfig", "StageSettings"}, path


def test_data_know_neither_arrays_nor_models():
    for path in files_of("data"):
        assert not frameworks(path) & (FRAMEWORKS - {"transformers"}), path


def test_models_take_only_the_batch_from_data():
    for path in files_of("models"):
        taken = {name for name in own_modules(path) if package_of(name) == "data"}
        assert taken <= {"data/batch"}, f"{path}: {taken}"


def test_the_report_takes_only_the_layout_from_checkpoints():
    """A report is drawn from the files of a run, without arrays and devices."""
    for path in files_of("report"):
        taken = {name for name in own_modules(path) if package_of(name) == "checkpoints"}
        assert taken <= {"checkpoints/layout"}, f"{path}: {taken}"


def test_torch_stays_in_conversion_and_parity():
    """Nothing else that ships, and no other test, may need torch; benchmarks run it beside us."""
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        if not re.match(r"unimoe_jax/convert/|tests/parity/", str(path.relative_to(ROOT))):
            assert "torch" not in frameworks(path), path


def test_safetensors_is_imported_once():
    """Its writer corrupts arrays that are not contiguous, so one module wraps it."""
    users = {name_of(path) for path in FILES if "safetensors" in frameworks(path)}
    assert len(users) <= 1, users


def test_mesh_axes_are_named_in_one_place():
    """Only parallel/sharding.py may write the name of a mesh axis as a string.

    `expert` and `tensor` are names of logical axes as well, and `data` is an ordinary word. So the
    test looks for literals in calls that take mesh axes, and for `fsdp` anywhere.
    """
    for path in FILES:
        if name_of(path) == "parallel/sharding":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if not re.fullmatch(TAKES_MESH_AXES, function):
                continue
            literals = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert not literals & set(MESH_AXES), f"{path}:{node.lineno} names a mesh axis"
        texts = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert "fsdp" not in texts, f"{path} names the mesh axis fsdp"

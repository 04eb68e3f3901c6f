"""No import goes up: a room knows the rooms below it, never those above. Public functions stay where they were."""

from __future__ import annotations

import ast
from pathlib import Path

from ercn import training

ROOT = Path(__file__).resolve().parents[2]
# From the ground up; rooms of one floor do not know each other.
FLOORS = [
    {"_environment", "_files", "_memory", "_progress", "_seeding", "config"},
    {"ops kernels"},
    {"elements transforms losses nn pretrained grad_checkpointing models objective maps checkpoint", "data", "doctor"},
    {"benchmarks", "report"},
    {"evaluation"},
    {"training", "export standalone"},
    {"ablation"},
    {"cli demo"},
]
FLOOR = {name: (level, room) for level, rooms in enumerate(FLOORS) for room in rooms for name in room.split()}
FOLDERS = {"ercn": ROOT / "ercn", "ercn.kernels": ROOT / "kernels", "ercn.benchmarks": ROOT / "benchmarks"}


def imported(file: Path) -> set[str]:
    """Names below ``ercn`` that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "ercn":
            names |= {f"ercn.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[1] for name in names if name.startswith("ercn.")}


def test_no_import_goes_up():
    wrong, seen = [], set()
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            name = package.removeprefix("ercn").removeprefix(".") or file.relative_to(folder).with_suffix("").parts[0]
            linked = any(parent.is_symlink() for parent in file.parents)  # the two others, in a tree without install
            door = file == ROOT / "ercn" / "training" / "__init__.py"  # looks its functions up in the rooms above
            if door or linked or name in ("__init__", "__main__") or file.name == "conftest.py":
                continue
            level, room = FLOOR[name]
            seen.add(name)
            for other in imported(file):
                other_level, other_room = FLOOR[other]
                if other_room != room and other_level >= level:
                    wrong.append(f"{file.relative_to(ROOT)} imports ercn.{other}")
    assert not wrong
    assert seen == set(FLOOR)


def test_no_test_module_is_imported_by_another():
    files = sorted((ROOT / "tests").rglob("*.py"))
    modules = {file.stem for file in files if file.stem.startswith("test_")}
    wrong = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                wrong.append(f"{file.relative_to(ROOT)} imports {node.module}")
    assert not wrong


def test_every_stage_is_a_function_of_training():
    names = ["ablate", "evaluate", "export", "plan", "predict", "pretrain", "select", "train", "train_ceiling"]
    assert sorted(training.__all__) == names
    assert all(getattr(training, name).__name__ == name for name in names)
    nodes = ast.walk(ast.parse(Path(training.__file__).read_text(encoding="utf-8")))
    typed = {alias.asname: node.module for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {name: typed.get(name) for name in names} == training._MODULES

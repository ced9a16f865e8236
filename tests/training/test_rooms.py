"""The subpackages of `ggam_fast.training` import only from lower ones, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

TRAINING = Path(__file__).resolve().parents[2] / "ggam_fast" / "training"
FLOORS = (
    ("errors",),
    ("config", "system"),
    ("data",),
    ("model", "measure"),
    ("show",),
    ("use",),
    ("run",),
    ("ablation",),
    ("cli",),
)
"""The floors, lowest first. A subpackage imports from itself and from lower floors."""
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module in a room by its dotted name below `ggam_fast.training`; a package by its own name."""
    found = {}
    for path in TRAINING.rglob("*.py"):
        parts = path.relative_to(TRAINING).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:
            found[".".join(parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Names below `ggam_fast.training` that a file imports, also inside functions and for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {node.module or ""} | {f"{node.module}.{name.name}" for name in node.names}
    below = "ggam_fast.training."
    return {name.removeprefix(below) for name in found if name.startswith(below)}


def graph() -> dict[str, set[str]]:
    """The modules that each module imports. A name in a module counts as that module."""
    files = modules()
    links = {}
    for name, path in files.items():
        found = imports(path)
        # `from room import module` also names the room, which does not count.
        links[name] = {
            other
            for other in found & files.keys()
            if other != name and not any(more.startswith(f"{other}.") and more in files for more in found)
        }
    return links


def test_every_module_is_in_a_room() -> None:
    assert {name.split(".")[0] for name in modules()} == LEVEL.keys()


def test_every_module_has_a_test_of_its_name() -> None:
    tests = Path(__file__).parent
    for name, path in modules().items():
        *rooms, module = name.split(".")
        if module == "__main__" or (path.name == "__init__.py" and not rooms):
            continue
        # For a package inside a room, the test may lie in a folder of the package's name.
        places = [(*rooms, f"test_{module}.py"), (*rooms, module, f"test_{module}.py")]
        assert any(tests.joinpath(*place).is_file() for place in places), name


def test_rooms_import_from_below_alone() -> None:
    for name, others in graph().items():
        room = name.split(".")[0]
        for other in others:
            beneath = other.split(".")[0]
            assert beneath == room or LEVEL[beneath] < LEVEL[room], f"{name} imports {other}"


def test_no_circle_between_modules() -> None:
    tuple(TopologicalSorter(graph()).static_order())  # raises CycleError, which names the circle


def test_the_public_face_imports_at_first_use() -> None:
    from ggam_fast import training

    assert all(getattr(training, name) is not None for name in training.__all__)
    assert set(training.__all__) == set(training._HOME)
    face = ast.parse((TRAINING / "__init__.py").read_text())
    at_once = [node.module or "" for node in face.body if isinstance(node, ast.ImportFrom)]
    assert not any(module.startswith("ggam_fast") for module in at_once)

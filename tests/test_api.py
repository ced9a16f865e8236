"""The public API, one-way imports between layers, optional dependencies, and environment variables."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ggam_fast
from ggam_fast import GGAMHead, checks, functional

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, KERNELS = ROOT / "ggam_fast", ROOT / "kernels"

LAYERS = (
    ("_checkout", "layer"),
    ("checks", "guidance", "norm", "precision", "backends.triton.launch"),
    ("base", "entropy", "backends.torch", "backends.triton.record"),
    ("closed_form", "classifier.layers", "backends.registry", "backends.triton.register"),
    ("autograd", "backends.triton.cross_entropy", "backends.triton.features_grad", "backends.triton.guidance",
     "backends.triton.layer_grads", "backends.triton.layers", "backends.triton.pooling"),
    ("differentiable", "backends.triton.sums", "classifier.rules"),
    ("backends.triton.flops",),
    ("backends.triton", "classifier.scores", "step"),
    ("called", "recorded"),
    ("compiled", "losses"),
    ("functional", "head", "reference"),
    ("explain", "integrations", "presets"),
    ("blocks", "hub", "tasks"),
)  # fmt: skip
"""Each module imports from the rows above its own alone."""


def modules() -> dict[str, Path]:
    """The library's own modules by dotted name; not packages that hold a docstring alone."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] in ("training", "__init__"):
            continue
        if parts[-1] == "__init__":
            parts = parts[:-1]
            if len(ast.parse(path.read_text()).body) == 1:
                continue
        found[".".join(parts)] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, anywhere in it."""
    tree = ast.parse(path.read_text())
    package = ["ggam_fast", "kernels"] if path.parent == KERNELS else list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            if node.module:
                yield base
            yield from (f"{base}.{name.name}" for name in node.names)


def own(names: Iterator[str]) -> set[str]:
    """The library's own modules among these names, and the packages they are in."""
    found = [name.removeprefix("ggam_fast.").split(".") for name in names if name.startswith("ggam_fast.")]
    return {".".join(parts[:i]) for parts in found for i in range(1, len(parts) + 1)}


def test_public_names() -> None:
    assert ggam_fast.__all__ == [
        "Explanation", "GGAMHead", "GGAMLoss", "GGAMLossParts", "GGAMOutput", "cam", "create_model",
        "explain", "functional", "guide_block", "presets", "reference", "replace_head",
    ]  # fmt: skip
    assert all(hasattr(ggam_fast, name) for name in ggam_fast.__all__)
    assert ggam_fast.cam is functional.cam
    assert functional.__all__ == sorted(functional.__all__)
    assert {n for n in functional.__all__ if n[0].islower()} == {
        "cam", "channel_sum", "fused_ggam_loss", "ggam_attention", "grad_cam_means", "grad_cam_weights",
        "guidance_loss", "position_loss", "spatial_sum",
    }  # fmt: skip


def test_every_public_name_is_documented() -> None:
    names = [getattr(ggam_fast, n) for n in ggam_fast.__all__]
    names += [getattr(functional, n) for n in functional.__all__]
    assert all(n.__doc__ for n in names)


def test_kernels_import_triton_and_themselves_alone() -> None:
    allowed = {"typing", "triton", "__future__", "enum", "dataclasses", "math"}
    for path in KERNELS.glob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] in allowed or name.startswith("ggam_fast.kernels"), (
                f"{path.name}: {name}"
            )
    assert not set(imports(KERNELS / "plan.py")) - {"typing", "typing.NamedTuple"}


def test_each_layer_imports_downward() -> None:
    rank = {name: i for i, row in enumerate(LAYERS) for name in row}
    files = modules()
    assert files.keys() == rank.keys()
    for name, path in files.items():
        for other in own(imports(path)) & rank.keys():
            # A module of a package has that package above it in its own name alone.
            if not f"{name}.".startswith(f"{other}."):
                assert rank[other] < rank[name], f"{name} imports {other}"


def test_every_module_has_its_test() -> None:
    """`a/b.py` has tests/a/test_b.py, or a folder tests/a/b of several."""
    tests = ROOT / "tests"
    for name in modules():
        *folders, leaf = (part.strip("_") for part in name.split("."))
        place = tests.joinpath(*folders)
        assert (place / f"test_{leaf}.py").exists() or any((place / leaf).glob("test_*.py")), name


def test_autograd_nodes_know_their_signature() -> None:
    """torch looks it up at every call, which takes longer than a launch."""
    nodes = {
        x
        for name in modules().keys() - {"hub", "tasks"}  # which need other libraries
        if checks.TRITON_AVAILABLE or "triton" not in name
        for x in vars(importlib.import_module(f"ggam_fast.{name}")).values()
        if isinstance(x, type) and issubclass(x, torch.autograd.Function) and "forward" in vars(x)
    }
    assert {node.__name__ for node in nodes} >= {"Attention", "HeldGradient", "Linear"}
    for node in nodes:
        remembered = vars(node.forward).pop("__signature__")
        try:
            assert remembered == inspect.signature(node.forward), node
        finally:
            vars(node.forward)["__signature__"] = remembered


def test_only_the_triton_backend_sees_the_kernels() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent != PACKAGE / "backends" / "triton":
            assert "kernels" not in own(imports(path)), path


def test_the_library_does_not_know_training() -> None:
    for path in [*modules().values(), PACKAGE / "__init__.py", *KERNELS.glob("*.py")]:
        assert "training" not in own(imports(path)), path.name
    assert "ggam_fast.training" not in run("import ggam_fast, sys; print(*sys.modules)").split()


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    env = {n: v for n, v in os.environ.items() if not n.startswith(("GGAM_FAST_", "TRITON_INTERPRET"))}
    path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**env, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_triton_timm_and_torchvision() -> None:
    code = """
import sys
for name in ("triton", "timm", "torchvision", "huggingface_hub", "ggam_fast.training"):
    sys.modules[name] = None
import torch, ggam_fast
head = ggam_fast.GGAMHead(32, 5)
out = head(torch.rand(4, 32, 3, 3), torch.tensor([0, 1, 2, 3]))
ggam_fast.GGAMLoss()(out, torch.tensor([0, 1, 2, 3])).backward()
assert "ggam_fast.backends.triton" not in sys.modules
try:
    ggam_fast.create_model("resnet18", 5)
except ImportError as error:
    print(error)
for name in ("GGAMTask", "HubModel"):
    try:
        getattr(ggam_fast, name)
    except ImportError as error:
        print(error)
try:
    ggam_fast.GGAMHead(32, 5, backend="triton")(torch.rand(4, 32, 3, 3))
except RuntimeError as error:
    print(error)
"""
    printed = run(code)
    assert 'backend="triton" needs the package triton' in printed
    assert "create_model needs timm: pip install timm" in printed
    assert "GGAMTask needs a timm that has timm.task: pip install -U timm" in printed
    assert "HubModel needs huggingface_hub: pip install huggingface_hub" in printed


@pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")
def test_kernels_are_an_attribute_of_the_package() -> None:
    assert "Triton device code" in run("import ggam_fast; print(ggam_fast.kernels.__doc__)")


def test_import_is_light() -> None:
    """Neither the training extras nor the compiler are imported with the library."""
    loaded = set(run("import ggam_fast, sys; print(*sys.modules)").split())
    heavy = {"timm", "torchvision", "huggingface_hub", "matplotlib", "captum", "torch._inductor.compile_fx"}
    assert not loaded & heavy


# Environment variables


@pytest.mark.parametrize(
    ("value", "backend", "expected"),
    [
        ("torch", "auto", "torch"),
        ("triton", "auto", "triton"),
        ("triton", "torch", "torch"),
        ("auto", "torch", "torch"),
    ],
)
def test_backend_variable_overrides_auto_alone(
    value: str, backend: str, expected: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setenv("GGAM_FAST_BACKEND", value)
    assert checks.backend(backend, torch.rand(1, 2, 3, device=device)) == expected


def test_backend_variable_reaches_the_head(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    head, x = GGAMHead(16, 3, rd_channels=2).to(device).eval(), torch.rand(2, 16, 3, 3, device=device)
    monkeypatch.setenv("GGAM_FAST_BACKEND", "triton")
    with pytest.raises(TypeError, match="got float64"):
        head.double()(x.double())
    monkeypatch.setenv("GGAM_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="GGAM_FAST_BACKEND must be one of"):
        head(x)


def test_auto_is_triton_on_a_gpu_tensor_alone(device: torch.device) -> None:
    x = torch.rand(1, 2, 3, device=device)
    assert checks.backend("auto", x) == ("triton" if device.type == "cuda" else "torch")
    assert checks.backend("auto", x.double()) == "torch"
    assert checks.backend("auto", x.cpu()) == "torch"


def test_triton_on_the_cpu_needs_the_interpreter() -> None:
    code = """
import torch, ggam_fast
try:
    ggam_fast.cam(torch.rand(1, 2, 3, 3), torch.rand(1, 2), backend="triton")
except ValueError as error:
    print(error)
"""
    assert "TRITON_INTERPRET=1" in run(code)


@pytest.mark.gpu
def test_range_of_targets_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    target = torch.tensor([0, 9], device="cuda")
    monkeypatch.setenv("GGAM_FAST_CHECKS", "1")
    with pytest.raises(ValueError, match=r"target must be in \[0, 5\); got 0 to 9"):
        checks.target(target, 2, 5)


def test_range_check_needs_no_sync_off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta tensor stands for any device whose values cannot be looked at without waiting."""
    target = torch.zeros(2, dtype=torch.int64, device="meta")
    assert checks.target(target, 2, 5) is target

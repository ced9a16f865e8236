"""Makes kernels/ importable as `ggam_fast.kernels` in a checkout that is not installed."""

import importlib.util
import sys
from pathlib import Path


def load_sibling_kernels() -> None:
    """Load the checkout's kernels/ as `ggam_fast.kernels`, unless the package is installed."""
    name = "ggam_fast.kernels"
    root = Path(__file__).resolve().parent.parent
    source = root / "kernels" / "__init__.py"
    if name in sys.modules or not (root / "pyproject.toml").exists() or not source.exists():
        return
    spec = importlib.util.spec_from_file_location(
        name, source, submodule_search_locations=[str(source.parent)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    setattr(sys.modules["ggam_fast"], "kernels", module)  # noqa: B010  (mypy does not know the attribute)

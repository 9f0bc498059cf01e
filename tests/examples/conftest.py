"""Packages that extend layerscope, as importlib.metadata sees them once they are installed."""

import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerscope_jax.scheduling.registry import FORECASTING, POLICIES
from layerscope_jax.support.plugins import LOADED

EXTEND = Path(__file__).parents[2] / "examples" / "extend"


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Restores what a test registers."""
    before = [(registry, registry.copy()) for registry in (POLICIES, LOADED)]
    forecasting, modules = FORECASTING.copy(), set(sys.modules)
    yield
    for registry, known in before:
        registry.clear()
        registry.update(known)
    FORECASTING.clear()
    FORECASTING.update(forecasting)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(EXTEND)):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Installs a package: its entry points in a `.dist-info` folder, its modules on the path."""

    def put(name: str, points: dict[str, dict[str, str]], modules: Path = tmp_path) -> Path:
        info = tmp_path / "site" / f"{name}-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(
            "".join(
                f"[{group}]\n" + "".join(f"{point} = {value}\n" for point, value in found.items())
                for group, found in points.items()
            )
        )
        for folder in (info.parent, modules):
            monkeypatch.syspath_prepend(folder)
        return info.parent

    return put


@pytest.fixture
def example(install) -> Path:
    """Installs `examples/extend`, with the entry points of its pyproject.toml."""
    project = tomllib.loads((EXTEND / "pyproject.toml").read_text())["project"]
    return install(project["name"], project["entry-points"], EXTEND)

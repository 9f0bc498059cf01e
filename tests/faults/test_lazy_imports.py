"""Names are imported when they are asked for, and look as if all were there from the beginning."""

import subprocess
import sys
from pathlib import Path

PACKAGES = ("layerscope_jax", "predictor")


def test_nothing_heavy_comes_along():
    program = (
        f"import sys, {', '.join(PACKAGES)}, layerscope_jax.distributed\n"
        "print(sorted({'jax', 'numpy', 'numba', 'tyro', 'ray', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_command_line_imports_no_cluster():
    program = "import sys, layerscope_jax.cli.main; print(sorted({'ray', 'pyarrow'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_modules_are_there_without_an_import_and_all_names():
    program = "import layerscope_jax as ls, predictor; ls.scheduling.plan.Replay; predictor.metrics.places\n"
    program += "assert ls.engine.Engine is ls.Engine\n"
    program += "".join(
        f"import {package} as found\n"
        "assert set(found.__all__) <= set(dir(found))\n"
        "assert all(getattr(found, name) is not None for name in found.__all__)\n"
        "assert all(name in vars(found) for name in found.__all__)\n"  # asked for once
        f"from {package} import *\n"
        "assert not hasattr(found, 'nothing') and not hasattr(found, '_nothing')\n"
        for package in PACKAGES
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_type_checkers_see_is_what_there_is():
    """The imports under TYPE_CHECKING and the table below them are the same."""
    import ast

    import layerscope_jax

    tree = ast.parse(Path(layerscope_jax.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    imports = {
        node.module.removeprefix("layerscope_jax."): tuple(alias.name for alias in node.names)
        for node in checked.body
    }
    assert imports == layerscope_jax._CONTENTS
    assert sorted(sum(imports.values(), ())) == sorted(layerscope_jax.__all__)

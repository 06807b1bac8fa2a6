"""What holds for the whole house: who imports whom, what an import costs, what is documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mla_jax
from mla_jax import flash_mla, megakernel, reference, sharding

ROOT = Path(__file__).parents[1]
# A layer may import those behind it, and itself.
LAYERS = (("mla_jax.cli", "mla_jax.bench"), ("mla_jax",), ("pallas_kernels",))
BACKENDS = ("reference", "triton", "mosaic_gpu")
SOURCES = sorted([*ROOT.glob("mla_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[str]:
    """The modules, and names in modules, that a file imports anywhere."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def layer(module: str) -> int | None:
    for number, packages in enumerate(LAYERS):
        if any(f"{module}.".startswith(f"{package}.") for package in packages):
            return number
    return None


def forbidden(path: Path) -> list[str]:
    """What a file imports against the arrows."""
    here = module_of(path)
    own = layer(here)
    assert own is not None
    wrong = [name for name in imports(path) if (to := layer(name)) is not None and to < own]
    folder, _, name = here.rpartition(".")
    if folder.startswith("pallas_kernels.") and name in BACKENDS:
        others = [f"{folder}.{other}" for other in BACKENDS if other != name]
        wrong += [n for n in imports(path) if any(f"{n}.".startswith(f"{o}.") for o in others)]
    return wrong


def test_imports_point_one_way():
    assert len(SOURCES) > 80
    assert {str(path): wrong for path in SOURCES if (wrong := forbidden(path))} == {}


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("mla_jax/rope.py", "from mla_jax.bench import timing"),
        ("mla_jax/rope.py", "import mla_jax.cli.main"),
        ("pallas_kernels/device.py", "def f():\n    from mla_jax import rope"),
        ("pallas_kernels/merge/triton.py", "from pallas_kernels.merge.reference import x"),
        ("pallas_kernels/merge/mosaic_gpu.py", "from pallas_kernels.merge import triton"),
    ],
)
def test_an_import_against_the_arrows_is_found(tmp_path, monkeypatch, where, line):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(forbidden(path)) == 1
    path.write_text("import jax\nfrom pallas_kernels.device import Device")
    assert forbidden(path) == []


def test_files_hold_one_idea():
    long = {str(path): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}


IMPORT = """
import sys, time
begin = time.perf_counter()
import jax, flax.nnx, jax.experimental.pallas
middle = time.perf_counter()
import mla_jax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "an import asked for a device"
assert not {"matplotlib", "torch", "mla_jax.bench", "mla_jax.cli"} & sys.modules.keys()
print(f"{time.perf_counter() - middle:.2f} s beyond jax and flax, {middle - begin:.2f} s for these")
"""


def test_an_import_touches_no_device():
    """Its seconds are printed (pytest -s): no test has a limit."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert "beyond jax" in done.stdout


def public() -> dict[str, object]:
    """Functions and classes of the public modules, by their full names."""
    modules: tuple[ModuleType, ...] = (mla_jax, flash_mla, megakernel, reference, sharding)
    return {
        f"{module.__name__}.{name}": value
        for module in modules
        for name in module.__all__
        if not inspect.ismodule(value := getattr(module, name)) and callable(value)
    }


# Records that functions make, whose examples show them; and numbers that are clear as they stand.
WITHOUT_EXAMPLE = {
    *("mla_jax.CheckpointError", "mla_jax.QuantizedLatents", "mla_jax.flash_mla.MLAMetadata"),
    *("mla_jax.megakernel.CostModel", "mla_jax.megakernel.DecodePlan"),
    "mla_jax.megakernel.Schedule",
    *("mla_jax.reference.LayerTrace",),
}


def test_public_names_have_docstrings_and_examples():
    """The suite runs the examples (--doctest-modules); here they are asked for."""
    names = public()
    assert len(names) > 35
    assert [name for name, value in names.items() if len(inspect.getdoc(value) or "") < 40] == []
    without = {name for name, value in names.items() if ">>>" not in (inspect.getdoc(value) or "")}
    assert without - WITHOUT_EXAMPLE == set()

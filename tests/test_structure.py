"""The package's own shape: public names, imports, docstrings, sizes, and what the documents say."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.slow import SLOW

import spectra

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "spectra").rglob("*.py"))

# What other projects rely on; a name that goes missing here breaks them.
CONTRACT = {
    "open_source": ["tuned", "base", "split", "heads", "scale"],
    "decompose": ["source", "top", "only_top", "device", "executor", "memory_budget"],
    "subspace_similarity": ["a", "b", "top", "side"],
    "summarize": ["spectra"],
    "save": ["spectra", "directory"],
    "load": ["directory"],
    "compare": ["a", "b", "top", "sides"],
    "draw_results": ["directories", "out"],
}
ATTRIBUTES = {
    "Source": ["kind", "deltas", "coverage", "select"],
    "Coverage": ["base_only", "tuned_only", "shape_mismatch", "unsupported", "skipped", "warnings"],
    "WeightDelta": ["name", "shape", "max_rank", "role", "layer", "read", "from_tensor", "from_factors"],
    "Spectra": ["names", "select", "to_frame", "directory", "run"],
    "Spectrum": ["name", "shape", "status", "S", "U", "Vh", "norm", "max_rank", "noise_edge"],
    "SubspaceSimilarity": ["grid", "chance", "side", "k_used"],
}


@pytest.mark.parametrize("name", CONTRACT)
def test_the_public_functions_keep_their_parameters(name):
    parameters = list(inspect.signature(getattr(spectra, name)).parameters)
    assert parameters[: len(CONTRACT[name])] == CONTRACT[name]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_public_types_keep_their_attributes(name):
    cls = getattr(spectra, name)
    there = {*dir(cls), *getattr(cls, "__dataclass_fields__", ())}
    assert set(ATTRIBUTES[name]) <= there


def test_every_public_name_is_there_and_has_a_docstring():
    assert set(spectra.__all__) == set(dir(spectra))
    for name in spectra.__all__:
        value = getattr(spectra, name)
        if callable(value):
            assert value.__doc__, name


def test_type_checkers_see_the_public_names():
    """They follow imports and not the list; the two say the same."""
    tree = ast.parse((ROOT / "spectra/__init__.py").read_text())
    imported = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("spectra.")
        for alias in node.names
        if alias.asname == alias.name
    }
    listed = {name: home for home, names in spectra._HOMES.items() for name in names}
    assert imported == listed | {"__version__": "spectra._version"}
    assert sum(map(len, spectra._HOMES.values())) == len(listed), "no name is there twice"


def test_import_loads_nothing_heavy():
    code = "import sys, spectra.spectrum, spectra.sources; print({'torch', 'pandas', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_listing_does_without_numpy(tmp_path):
    """Numpy alone takes as long as all the rest of `spectra inspect`."""
    save_file({"layers.0.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    code = (
        f"import sys; from spectra.cli import main; main(['inspect', {str(tmp_path)!r}], standalone_mode=False); "
        "print({'numpy', 'torch', 'ssl'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("\nset()\n")


def test_every_module_imports():
    for module in pkgutil.walk_packages(spectra.__path__, "spectra."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def functions():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def test_functions_do_one_thing():
    """60 lines without the docstring is the sign to split."""
    for path, node in functions():
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if body:
            assert body[-1].end_lineno - body[0].lineno < 60, f"{path.name}:{node.name}"


def test_files_are_rooms_not_halls():
    sizes = {path.name: len(path.read_text().splitlines()) for path in MODULES}
    assert {name: size for name, size in sizes.items() if size > 450} == {}


def test_every_parameter_is_annotated():
    for path, node in functions():
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            assert argument.annotation or argument.arg in ("self", "cls"), f"{path.name}:{node.name}({argument.arg})"


FORBIDDEN = {
    r"except Exception": "swallows faults",
    r"except:": "swallows faults",
    r"plt\.show": "the library draws, the user shows",
    r"trust_remote_code": "no code of a model runs",
    r"weights_only=False": "pickles are not trusted",
    r"allow_tf32\s*=\s*True": "float32 products would lose digits",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_what_must_not_exist(pattern):
    found = [path.name for path in MODULES if re.search(pattern, path.read_text())]
    assert not found, FORBIDDEN[pattern]


def test_what_is_listed_as_slow_exists():
    for entry in SLOW:
        file, _, start = entry.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert f"def {start}" in text, entry


def test_only_code_and_templates_are_packaged():
    """The wheel is what lies in spectra/: no data of experiments, no figures."""
    kinds = {
        path.suffix for path in (ROOT / "spectra").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert kinds <= {".py", ".typed", ".html", ".css", ".js", ""}


def test_the_arrows_point_one_way():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


README = (ROOT / "README.md").read_text()


def test_the_readme_leads_with_the_two_commands_and_they_exist():
    first = README.split("```")[1]
    assert "make demo" in first
    assert "make test" in README
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test", "docs", "lint"} <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_only_one_arrow_points_up_and_it_has_a_name():
    """A collection's own .report(): other exceptions of the contracts are libraries."""
    ignored = re.findall(
        r'^\s*(?:ignore_imports = \[)?"(spectra\S* -> spectra\S*)"', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert set(ignored) == {"spectra.results.collection -> spectra.report"}
    hidden = [path.name for path in MODULES if 'import_module("spectra")' in path.read_text()]
    assert hidden == []

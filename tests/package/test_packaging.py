"""What an installation declares, contains and needs; the install without a compiler."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parents[2]
PROJECT = read_configuration(ROOT / "pyproject.toml", expand=False)
# Packages whose modules have another name.
PACKAGE_OF = {
    "PIL": "pillow",
    "docstring_parser": "docstring-parser",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
OURS = {"ercn", "gpu_report", "toolchain"}  # scripts that run without an installation import the last two


def package_name(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


EXTRAS = {
    extra: {package_name(requirement) for requirement in requirements}
    for extra, requirements in PROJECT["project"]["optional-dependencies"].items()
}


AT_ROOT = ("LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "mkdocs.yml")
AT_ROOT += (".clang-format", ".editorconfig")


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory):
    """A copy of the files that the build reads, without anything built in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "Makefile", *AT_ROOT):
        shutil.copy(ROOT / name, copy / name)
    built = shutil.ignore_patterns("lib", "*.so", "_build.json", "__pycache__")

    def not_sources(folder, names):  # also the links that gpu_check makes
        return {*built(folder, names), *(name for name in names if Path(folder, name).is_symlink())}

    for name in ("ercn", "kernels", "benchmarks", "csrc", "docs", "examples", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=not_sources)
    return copy


def run(command, cwd, env):
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def package_files(source):
    """Modules and data files of the package, relative to ``source``."""
    return {str(file.relative_to(source)) for file in source.glob("ercn/**/*") if file.is_file()}


def build(source, hook, destination, **environment):
    """Run a PEP 517 hook in ``source`` as pip does with --no-build-isolation."""
    script = f"from setuptools.build_meta import {hook}; print({hook}({str(destination)!r}))"
    return run([sys.executable, "-c", script], cwd=source, env=os.environ | environment)


def run_outside(script, cwd, path):
    """Run Python in ``cwd`` with ``path`` before the installed packages; -S keeps an editable ercn out."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), sysconfig.get_path("platlib")])}
    return run([sys.executable, "-S", "-c", script], cwd=cwd, env=environment)


def test_runtime_requirements():
    assert PROJECT["project"]["requires-python"] == ">=3.10"
    assert PROJECT["project"]["dependencies"] == ["torch>=2.10", "numpy", "triton; platform_system == 'Linux'"]


def test_every_package_of_the_tree_is_installed():
    in_tree = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("ercn/**/__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == in_tree | {"ercn.benchmarks", "ercn.kernels"}


def test_type_checkers_read_the_annotations():
    assert (ROOT / "ercn/py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["ercn"]


def test_every_import_is_a_declared_requirement():
    runtime = {package_name(requirement) for requirement in PROJECT["project"]["dependencies"]} | EXTRAS["train"]
    undeclared = set()
    bench = runtime | EXTRAS["bench"] | {"pytest", "pynvml"}
    folders = {"ercn": runtime | EXTRAS["export"], "kernels": runtime, "benchmarks": bench}
    files = [(file, allowed) for name, allowed in folders.items() for file in ROOT.glob(f"{name}/**/*.py")]
    for file, declared in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            modules = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - OURS
            undeclared |= {(module, file.name) for module in modules if PACKAGE_OF.get(module, module) not in declared}
    assert not undeclared


def test_licence_is_declared():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert PROJECT["project"]["license-files"] == ["LICENSE"]


def test_constraints_pin_every_declared_package():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        match = re.fullmatch(r"([a-z0-9.-]+)==([\w.]+)(; python_(full_)?version >= \"[\d.]+\")?", line)
        assert match, f"not package==version: {line!r}"
        pins[match[1]] = match[2]
    declared = {package_name(requirement) for requirement in PROJECT["project"]["dependencies"]}
    declared |= {package_name(requirement) for requirement in PROJECT["build-system"]["requires"]}
    assert declared.union(*EXTRAS.values()) <= set(pins)


def test_sdist_has_what_a_build_and_the_tests_need(source_copy, tmp_path):
    result = build(source_copy, "build_sdist", tmp_path)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    needed = {"setup.py", "pyproject.toml", "kernels/__init__.py", *AT_ROOT} | package_files(source_copy)
    for name in ("benchmarks/results", "csrc", "docs", "examples", "tests"):
        needed |= {str(file.relative_to(source_copy)) for file in source_copy.glob(f"{name}/**/*") if file.is_file()}
    assert {"docs/export.md", "docs/maps.jpg", "docs/_doctests.py", "tests/data/golden/pamr.npz"} <= needed
    assert not needed - packed


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

BLOCKED = %r
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize("module", ["ercn", "ercn.ops", "ercn.nn", "ercn.losses", "ercn.config", "ercn.doctor"])
def test_torch_and_numpy_are_enough(module, tmp_path):
    modules = {package: name for name, package in PACKAGE_OF.items()}
    optional = {modules.get(package, package) for package in EXTRAS["train"]} | {"triton", "scipy", "pandas"}
    script = BLOCKER % optional + f"import {module}\nimport ercn.ops, torch\n"
    script += "print(ercn.ops.relu_affinity(torch.ones(1, 1, 2), torch.ones(1, 3, 2)).tolist())"
    result = run_outside(script, tmp_path, ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[[[6.0, 6.0]]]"


def test_import_takes_nothing_optional_and_no_gpu(tmp_path):
    # torch.utils.flop_counter, where operators register their FLOP formulas, imports Triton by itself if it can.
    script = (
        "import sys, torch.utils.flop_counter, numpy; before = set(sys.modules); import ercn; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)), 'ercn.kernels' in sys.modules, torch.cuda.is_initialized())"
    )
    result = run_outside(script, tmp_path, ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['ercn'] False False"


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, words",
    [
        pytest.param({"ERCN_BUILD": "none"}, "ERCN_BUILD=none left it out", id="left out"),
        pytest.param({"CXX": "absent-compiler"}, "no C++ compiler: 'absent-compiler' was not found", id="no compiler"),
        pytest.param({"CXX": "false"}, "the compiler failed on it", id="compiler fails"),
    ],
)
def test_install_without_the_extension(source_copy, tmp_path, environment, words):
    result = build(source_copy, "build_wheel", tmp_path, **{"ERCN_BUILD": "auto"} | environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert words in result.stderr
    site = tmp_path / "site"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    assert package_files(source_copy) | {"ercn/kernels/__init__.py", "ercn/_build.json"} <= package_files(site)
    script = (
        "import sys, ercn.kernels, ercn.doctor; assert 'kernels' not in sys.modules; "
        "print(ercn.__file__); sys.exit(ercn.doctor.doctor(selftest=True))"
    )
    result = run_outside(script, tmp_path, site)
    assert result.returncode == 0, result.stdout + result.stderr
    assert str(site) in result.stdout.splitlines()[0]
    assert f"libercn was not built: {words}" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, words",
    [
        pytest.param({"ERCN_BUILD": "cpu", "CXX": "absent-compiler"}, "'absent-compiler' was not found", id="compiler"),
        pytest.param(
            {"ERCN_BUILD": "cuda", "CXX": sys.executable, "PATH": ""}, "nvcc was not found on PATH", id="toolkit"
        ),
        pytest.param({"ERCN_BUILD": "cuda", "ERCN_CUDA_ARCHS": "7.5"}, "capabilities from 8.0 on", id="archs"),
        pytest.param({"ERCN_BUILD": "fast"}, "must be one of auto, cpu, cuda, none; it is 'fast'", id="mode"),
    ],
)
def test_a_demanded_build_that_cannot_be_fails_in_a_sentence(source_copy, tmp_path, environment, words):
    result = build(source_copy, "build_wheel", tmp_path, **environment)
    assert result.returncode != 0
    assert words in result.stderr
    assert not list(tmp_path.glob("*.whl"))

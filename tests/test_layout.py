"""Rules of the layout: names match across packages, imports run one way, importing has no side effects."""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import types

import pytest

import soul
import soul_kernels
from soul_kernels import _versions
from tests import conftest
from tests.support import architecture

ROOT = pathlib.Path(__file__).parent.parent
NOT_OPS = {"rounding"}  # device functions: tested, but nothing to time on their own
BESIDE = {"backends", "bundles", "chunks", "errors", "lookup", "tensors", "tokens"}  # public, and no ops


def stems(folder, prefix=""):
    every = {path.stem.removeprefix(prefix) for path in (ROOT / folder).glob(f"{prefix}*.py")}
    return {stem for stem in every if not stem.startswith("_")}


def test_every_op_has_its_reference_test_and_benchmark():
    ops = stems("soul_kernels") - BESIDE
    assert ops == stems("soul_kernels/reference")
    assert ops <= stems("tests/kernels", "test_")
    assert ops - NOT_OPS == stems("bench", "bench_")


def imported(tree):
    return (name for node in architecture.nodes(tree) for name in names_of(node))


def names_of(node):
    """Return the modules that a statement imports; nothing for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


@pytest.fixture(scope="module")
def house():
    """Return the syntax trees of all modules."""
    return architecture.read_modules(ROOT)


def test_arrows_run_one_way(house):
    assert architecture.wrong_arrows(house) == []


@pytest.mark.parametrize("wing", [wing for wing in architecture.WINGS if (ROOT / "soul" / wing / "__init__.py").exists()])
def test_a_wing_says_what_it_may_import_and_where_to_start_reading(house, wing):
    docstring = ast.get_docstring(house[f"soul.{wing}".rstrip(".")])
    (stated,) = re.findall(r"^May import: ([\w,\s]+|nothing of ``soul``)\.", docstring, re.MULTILINE)
    names = set() if stated.startswith("nothing") else set(re.split(r",\s+", stated))
    assert {"" if name == "soul" else name for name in names} == architecture.WINGS[wing]
    assert "Start reading with `" in docstring


def test_private_modules_are_imported_by_their_own_package_and_their_tests_only(house):
    assert architecture.private_imports(house) == []


def test_no_module_reaches_into_private_attributes_of_another_object(house):
    assert architecture.friend_access(house) == []
    used = "".join(path.read_text() for path in (ROOT / "soul").rglob("*.py"))
    assert [name for name in architecture.FOREIGN_PRIVATE if name not in used] == []


def test_no_modules_import_each_other_in_a_circle(house):
    assert architecture.circles(house) == []


def test_every_function_is_annotated(house):
    assert architecture.without_annotations(house) == []


QUOTED = re.compile(r"`(soul(?:_kernels)?(?:\.\w+)+)")
IMPORTED = re.compile(r"^ *from (soul(?:_kernels)?(?:\.\w+)*) import (\w+(?:, \w+)*)", re.MULTILINE)
SUFFIXES = (".json", ".md", ".py", ".txt", ".yaml")


def documented_names(text):
    """Return the dotted names of ours that a text quotes in backticks or imports; names of files are none."""
    names = [name for name in QUOTED.findall(text) if not name.endswith(SUFFIXES)]
    return names + [f"{module}.{name}" for module, imported in IMPORTED.findall(text) for name in imported.split(", ")]


def is_there(name):
    """Tell whether a dotted name is a module or an attribute of one; what only an extra can import counts as there."""
    module, *rest = name.split(".")
    value = importlib.import_module(module)
    for step in rest:
        module = f"{module}.{step}"
        if hasattr(value, step):
            value = getattr(value, step)
            continue
        if not hasattr(value, "__path__") or importlib.util.find_spec(module) is None:
            return False
        try:
            value = importlib.import_module(module)
        except ImportError:
            return True
    return True


def test_names_in_documents_and_docstrings_are_there():
    texts = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}
    for package in ("soul", "soul_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
            texts[path] = "\n".join(ast.get_docstring(node) or "" for node in nodes)
    for path, text in texts.items():
        missing = [name for name in documented_names(text) if not is_there(name)]
        assert not missing, f"{path.relative_to(ROOT)} names {missing}"


@pytest.mark.parametrize("text, missing", [
    ("see `soul.losses.NPO(beta=0.1)`, ``soul.data``, `soul_config.json` and `soul.integrations.open_unlearning.trainers`", []),
    ("`soul.losses.Npo`", ["soul.losses.Npo"]),
    ("``soul.rewards``", ["soul.rewards"]),
    ("from soul.models import load, unload", ["soul.models.unload"]),
])  # fmt: skip
def test_a_name_that_is_not_there_is_found(text, missing):
    assert [name for name in documented_names(text) if not is_there(name)] == missing


@pytest.mark.parametrize("rule, file, line", [
    (architecture.wrong_arrows, "soul_kernels/grad_norm.py", "from soul.losses import NPO"),
    (architecture.wrong_arrows, "soul/data/rows.py", "from soul.models import causal_lm"),
    (architecture.wrong_arrows, "soul/optim/states.py", "def late():\n    from soul.run import config"),
    (architecture.wrong_arrows, "soul_kernels/reference/rounding.py", "from soul_kernels import backends"),
    (architecture.private_imports, "soul/losses.py", "from soul_kernels._table import TensorTable"),
    (architecture.private_imports, "soul/losses.py", "from soul_kernels.sophia_step import _step_block"),
    (architecture.private_imports, "tests/kernels/test_table.py", "from soul_kernels import _compiled"),
    (architecture.friend_access, "soul/run/step.py", "def norm(optimizer):\n    return optimizer._stepper"),
    (architecture.friend_access, "soul/run/step.py", "def norm(optimizer):\n    return getattr(optimizer, '_stepper')"),
    (architecture.circles, "soul_kernels/errors.py", "def late():\n    import soul_kernels.tensors"),
    (architecture.without_annotations, "soul/losses.py", "def untyped(x):\n    return x"),
])  # fmt: skip
def test_a_planted_breach_is_found(rule, file, line, house):
    module = architecture.module_name(pathlib.Path(file))
    planted = {**house, module: ast.parse(f"{(ROOT / file).read_text()}\n\n{line}\n")}
    assert len(rule(planted)) == 1  # and none without it: the tests above


def test_only_one_module_imports_triton(house):
    ours = [module for module in house if module.partition(".")[0] in ("soul_kernels", "soul")]
    users = [module for module in ours if any(name.partition(".")[0] == "triton" for name in imported(house[module]))]
    assert users == ["soul_kernels._launch"]


OPTIONAL = {"transformers", "trl", "peft", "datasets", "matplotlib", "scipy", "sklearn", "rouge_score"}


@pytest.mark.parametrize("package", ["soul_kernels", "soul"])
def test_what_an_extra_brings_is_imported_within_functions(package):
    """Except in `soul.integrations`, whose users have the extras."""
    for path in (ROOT / package).rglob("*.py"):
        if "integrations" not in path.parts:
            names = {name.partition(".")[0] for node in ast.parse(path.read_text()).body for name in names_of(node) if name}
            assert not names & OPTIONAL, path


# Import -> name on PyPI, if another.
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "optimi": "torch-optimi", "quack": "quack-kernels",
                 "profanity_check": "alt-profanity-check"}  # fmt: skip
BUILT = {"apex", "dion", "transformer_engine"}  # by commands of their own: bench/_harness.py, INSTALLED_BY
OURS = {"soul", "soul_kernels", "bench", "trainer"}  # the last one is open-unlearning's own


def test_what_is_imported_is_declared(house, monkeypatch):
    """Dependencies are declared in setup.py, not installed by chance through another package."""
    setuptools = pytest.importorskip("setuptools")
    declared = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: declared.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    lines = [*declared["install_requires"], *(line for extra in declared["extras_require"].values() for line in extra)]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in lines}
    known = OURS | BUILT | sys.stdlib_module_names
    for module, tree in house.items():
        if module.partition(".")[0] == "tests":
            continue
        required = [node.args[0].value for node in architecture.nodes(tree) if isinstance(node, ast.Call) and node.args
                    and getattr(node.func, "id", None) == "require" and isinstance(node.args[0], ast.Constant)]  # fmt: skip
        for name in {name.split(".")[0] for name in [*imported(tree), *required] if name} - known:
            needed = DISTRIBUTIONS.get(name, name).replace("_", "-")
            assert needed in names, f"{module} imports {name}, and setup.py does not ask for {needed}"


def test_tests_are_collected_without_the_extras(house):
    """One module that cannot be imported, and pytest runs nothing at all; a machine with a GPU may have next to nothing."""
    optional = {"accelerate", "datasets", "matplotlib", "peft", "pyarrow", "rouge_score", "scipy", "sklearn"}
    for module in [module for module in house if module.startswith("tests.") and not module.startswith("tests.clients")]:
        names = {name.split(".")[0] for node in house[module].body for name in names_of(node)}
        wrong = optional & names
        assert not wrong, f"{module} imports {wrong}: pytest.importorskip where it is used"


def run_without(*modules, code):
    """Run code in a process where the modules cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"  # None: ModuleNotFoundError
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd=ROOT)


def test_import_is_silent_and_needs_neither_triton_nor_extras():
    result = run_without(
        "triton", "transformers", "tokenizers", "matplotlib", "rouge_score", "tqdm",
        code="import soul, soul_kernels, torch\n"
        "p = [torch.ones(3)]; g = [torch.ones(3)]; m = [torch.zeros(3)]; h = [torch.zeros(3)]\n"
        "soul_kernels.sophia_step(p, g, m, h, lr=0.1, beta1=0.9, rho=0.04, bs=1)\n"
        "assert abs(p[0][0] - 0.9) < 1e-6",
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.slow(reason="a process that imports torch; that an import is silent is always tested")
def test_import_leaves_the_compiler_where_it_is():
    """torch.compile's front end takes longer to import than torch itself, and torch imports it when it is first used."""
    code = "import torch, sys; before = {*sys.modules}; import soul; print(*sorted({*sys.modules} - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    modules = result.stdout.split()
    assert "soul.run.loop" in modules and not [m for m in modules if re.match(r"torch\._(dynamo|inductor|functorch)|sympy", m)]


@pytest.mark.slow(reason="a process that imports torch and both packages again and again")
def test_an_old_torch_or_triton_is_named_before_anything_fails():
    """At import, with the versions that setup.py asks for; later versions, and what is no version, pass."""
    code = """
        import sys, torch, triton
        for package, version in ((torch, "2.9.1+cu126"), (triton, "3.5.1")):
            kept, package.__version__ = package.__version__, version
            for name in ("soul", "soul_kernels"):
                try:
                    __import__(name)
                    print("imported")
                except ImportError as error:
                    print(type(error).__name__, error)
                for module in [m for m in sys.modules if m.partition(".")[0] in ("soul", "soul_kernels")]:
                    del sys.modules[module]
            package.__version__ = kept
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT)
    torch_line = "ImportError torch: expected version 2.10 or newer, got 2.9.1+cu126; pip install 'torch>=2.10'"
    triton_line = "ImportError triton: expected version 3.6 or newer, got 3.5.1; pip install 'triton>=3.6'"
    assert result.stdout.splitlines() == [torch_line] * 2 + [triton_line] * 2 and not result.stderr, result
    for package, version in (("torch", "2.10.0"), ("torch", "3.0.0a0+git1"), ("torch", "local"), ("triton", "3.10.1")):
        _versions.check_version(package, version)
    requirements = (ROOT / "setup.py").read_text()
    for package, oldest in _versions.OLDEST.items():
        assert f"{package}>={'.'.join(map(str, oldest))}" in requirements


@pytest.mark.slow(reason="a process that imports torch and transformers; each command's own tests have its missing extras")
def test_command_names_the_missing_extra(tmp_path):
    """In one process, since each takes seconds to import torch."""
    out = str(tmp_path / "out")
    cases = (
        ("matplotlib", "plots", ["demo", "--output", out]),
        ("sklearn", "eval", ["demo", "--output", out]),
        ("transformers", "hf", ["unlearn", "--model", "x", "--forget", "f", "--output", out]),
    )
    code = (
        "from soul.cli import main\n"
        f"for missing, extra, argv in {cases!r}:\n"
        "    kept = sys.modules.pop(missing, None)\n"
        "    sys.modules[missing] = None\n"
        "    print(extra, main(argv), file=sys.stderr)\n"
        "    del sys.modules[missing]\n"
        "    sys.modules.update({missing: kept} if kept else {})\n"
    )
    said = run_without(code=code).stderr.splitlines()
    for message, status, (_, extra, _) in zip(said[0::2], said[1::2], cases, strict=True):
        assert status == f"{extra} 2" and f"pip install 'soul-kernels[{extra}]'" in message, said
    assert not (tmp_path / "out").exists()


def test_every_client_has_an_environment_of_its_own():
    """`make test-clients` takes the clients from the names of the tests."""
    requirements = {path.stem.removeprefix("requirements-") for path in (ROOT / "tests/clients").glob("requirements-*.txt")}
    assert stems("tests/clients", "test_") <= requirements


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_on_a_gpu_a_file_that_fails_or_hangs_does_not_cost_the_others(tmp_path):
    """The time of a card is short; 124 is what `timeout` ends with, 5 what pytest does where all is skipped."""
    python = tmp_path / "python"
    cases = "case $3 in bad) exit 1;; skipped) exit 5;; hangs) exec sleep 60;; esac"
    python.write_text(f"#!/bin/sh\n{cases}\necho $TRITON_INTERPRET\n")
    python.chmod(0o755)
    codes = {"hangs": 124, "bad": 1, "good": 0, "skipped": 5}
    for names, status in (("hangs bad good skipped", 2), ("good skipped", 0)):
        command = ["make", "test-gpu", f"PYTHON={python}", "LIMIT=1", f"TESTS={names}"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == status, result
        assert all(f"{name}: status {codes[name]}" in result.stdout.splitlines() for name in names.split())
        assert "0\ngood: status 0" in result.stdout


# The easy form of two takes every option as a keyword, beside one with bundles; the third has the options of torch's function.
WIDE = {"sophia_step", "hessian_ema", "linear_cross_entropy"}


def test_no_public_function_of_the_kernels_has_more_than_ten_parameters():
    functions = [getattr(soul_kernels, name) for name in soul_kernels.__all__]
    for stem in ("linear_gnb", "linear_kl", "linear_loss"):
        functions += vars(importlib.import_module(f"soul_kernels.reference.{stem}")).values()
    functions = {function for function in functions if inspect.isfunction(function) and function.__name__ not in WIDE}
    assert soul_kernels.linear_objective in functions
    assert [f for f in functions if len(inspect.signature(f).parameters) > 10] == []


def test_version_and_public_names():
    assert soul.__version__ == soul_kernels.__version__
    for module in (soul, soul_kernels):
        assert all(hasattr(module, name) for name in module.__all__)


def test_options_that_would_have_no_effect_on_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = types.SimpleNamespace(getoption=lambda name: name == "ptx_strict")
    with pytest.raises(pytest.UsageError, match="^--ptx-strict: expected no GPU"):
        conftest.choose_kernels(config)

"""The rules of imports and annotations, as functions of a source tree that list what breaks them.

Imports within functions count like those at the top of a file: an arrow that is deferred is an arrow.
"""

import ast
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

# What may import what, from the ground up.
PACKAGES = {
    "soul_kernels": {"soul_kernels"},
    "soul": {"soul_kernels", "soul"},
    "bench": {"soul_kernels", "soul", "bench"},
    "tests": {"soul_kernels", "soul", "bench", "tests"},
}
# A wing of `soul`, or one of its files -> the others that it may import. "" is soul/__init__.py.
WINGS = {
    "_extras": set(),
    "_limits": set(),
    "losses": set(),
    "output": set(),
    "distributed": {"output"},
    "data": {"_extras", "_limits"},
    "optim": {"distributed"},
    "models": {"_extras", "data", "distributed", "output"},
    "functional": {"_extras", "losses", "models"},
    "model_loss": {"functional", "losses", "models"},
    "evaluate": {"_extras", "data", "models", "output"},
    "checkpoint": {"_extras", "distributed", "models", "output"},
    "run": {"_extras", "checkpoint", "data", "distributed", "evaluate", "losses", "models", "optim", "output"},
    "plan": {"_extras", "distributed", "losses", "models", "optim", "run"},
    "study": {"_extras", "checkpoint", "data", "evaluate", "losses", "models", "output", "run"},
    "integrations": {"data", "distributed", "functional", "losses", "model_loss", "models", "optim"},
    "": {"functional", "losses", "model_loss", "models", "optim", "plan", "run"},
    "commands": {"", "_extras", "checkpoint", "data", "distributed", "evaluate", "losses", "models", "output", "plan", "run",
                 "study"},
    "cli": {"", "_extras", "checkpoint", "commands", "distributed", "output", "run"},
    "__main__": {"cli"},
}  # fmt: skip
# The reference stands below everything else of soul_kernels.
BELOW_REFERENCE = {"soul_kernels.errors", "soul_kernels.tokens"}
# A test -> the private modules of soul_kernels that it tests or takes apart.
PRIVATE = {
    "tests.conftest": {"_head.rows", "reference._rows"},  # blocks so small that a test has several
    "tests.integrations.test_integrations": {"_launch"},
    "tests.kernels.test_compile": {"_launch"},  # compiles kernels without launching them
    "tests.kernels.test_compiled": {"_compiled"},
    "tests.kernels.test_head_ops": {"_head.autograd", "_head.rows", "_head.custom_ops"},
    "tests.kernels.test_kl_divergence": {"_head.rows"},  # kernels and their stand-ins in PyTorch, by one name
    "tests.kernels.test_linear_loss": {"_head.gradients", "_head.rows"},
    "tests.kernels.test_rounding": {"_launch"},  # launches kernels of its own
    "tests.kernels.test_sophia_step": {"_compiled", "_launch", "_table", "reference._blocks"},
    "tests.kernels.test_table": {"_table"},
    "tests.kernels.test_token_draw": {"_head.rows"},
    "tests.kernels.test_token_logprob": {"_head.rows"},
    "tests.ptx.test_ptx_faults": {"_table"},
    "tests.test_functional": {"_head.checks", "reference._rows"},
    "tests.test_layout": {"_versions"},
}


class Import(NamedTuple):
    """One name that a module imports: a module, or a ``name`` out of one."""

    importer: str
    module: str
    name: str | None
    line: int


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the path of every module of the packages under ``root``, by its dotted name."""
    paths = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def imports(paths: dict[str, pathlib.Path]) -> Iterator[Import]:
    """List the imports of our own modules, wherever in a file they stand."""
    for importer, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (Import(importer, name.name, None, node.lineno) for name in node.names if name.name in paths)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for name in node.names:
                    submodule = f"{node.module}.{name.name}"
                    if submodule in paths:
                        yield Import(importer, submodule, None, node.lineno)
                    elif node.module in paths:
                        yield Import(importer, node.module, name.name, node.lineno)


def wrong_arrows(root: pathlib.Path) -> list[str]:
    """List the imports that run upwards: between packages, between wings of ``soul``, and out of the reference."""
    wrong = []
    for importer, module, name, line in imports(modules(root)):
        package, target = importer.partition(".")[0], module.partition(".")[0]
        allowed = target in PACKAGES[package]
        if package == target == "soul":
            wing, other = wing_of(importer), wing_of(module)
            allowed = wing == other or other in WINGS.get(wing, ())
        if importer.startswith("soul_kernels.reference"):
            allowed = module in BELOW_REFERENCE or module.startswith("soul_kernels.reference")
        if not allowed:
            wrong.append(f"{importer}:{line} imports {module}{f' ({name})' if name else ''}")
    return wrong


def wing_of(module: str) -> str:
    """Return the wing of a module of ``soul``; "" for soul/__init__.py."""
    return module.removeprefix("soul").strip(".").partition(".")[0]


def private_imports(root: pathlib.Path) -> list[str]:
    """List the imports of private modules and names of ``soul_kernels`` by others, but for tests of the module itself."""
    wrong = []
    for importer, module, name, line in imports(modules(root)):
        if importer.startswith("soul_kernels") or not module.startswith("soul_kernels"):
            continue
        inner = module.removeprefix("soul_kernels").removeprefix(".")
        if inner in PRIVATE.get(importer, ()):
            continue
        parts = [*inner.split("."), name or ""]
        if any(part.startswith("_") and not part.startswith("__") for part in parts):
            wrong.append(f"{importer}:{line} imports {module}{f' ({name})' if name else ''}")
    return wrong


def circles(root: pathlib.Path) -> list[list[str]]:
    """List the groups of modules that import each other in a circle."""
    paths = modules(root)
    targets: dict[str, set[str]] = {name: set() for name in paths}
    for importer, module, _, _ in imports(paths):
        targets[importer].add(module)
    reach: dict[str, set[str]] = {}
    for start in targets:
        seen, waiting = set(), [*targets[start]]
        while waiting:
            module = waiting.pop()
            if module not in seen:
                seen.add(module)
                waiting += targets[module]
        reach[start] = seen
    in_circles = [module for module in targets if module in reach[module]]
    groups = {frozenset(other for other in reach[module] if module in reach[other]) for module in in_circles}
    return sorted(sorted(group) for group in groups)


def without_annotations(root: pathlib.Path) -> list[str]:
    """List the functions of the library and the benchmarks that lack an annotation; ``@triton.jit`` functions need none."""
    lacking = []
    for name, path in modules(root).items():
        if name.partition(".")[0] == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_kernel(node):
                continue
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            named = [argument for argument in every if argument and argument.arg not in ("self", "cls", "ctx", "_")]
            if node.returns is None or any(argument.annotation is None for argument in named):
                lacking.append(f"{name}:{node.lineno} {node.name}")
    return lacking


def _is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)

"""The rules of imports, private names and annotations, as functions of a source tree that list what breaks them.

Imports within functions count like those at the top of a file: an arrow that is deferred is an arrow.
"""

import ast
import functools
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
    "_connection": {"_extras"},
    "_limits": set(),
    "losses": set(),
    "presets": set(),
    "compat": {"losses"},
    "output": set(),
    "report": {"_extras", "output"},
    "hub": {"_extras", "output", "report"},
    "distributed": {"output"},
    "data": {"_connection", "_extras", "_limits"},
    "optim": {"distributed"},
    "models": {"_connection", "_extras", "data", "distributed", "output"},
    "functional": {"compat", "losses", "models"},
    "model_loss": {"compat", "losses", "models"},
    "patching": {"_extras", "losses", "model_loss", "models"},
    "evaluate": {"_connection", "_extras", "data", "models", "output"},
    "tasks": {"_connection", "_extras", "data", "evaluate", "models", "presets"},
    "checkpoint": {"_extras", "distributed", "models", "output"},
    "run": {"_extras", "checkpoint", "data", "distributed", "evaluate", "hub", "losses", "models", "optim", "output"},
    "plan": {"_connection", "_extras", "data", "distributed", "losses", "models", "optim", "output", "run"},
    "durability": {"_extras", "data", "evaluate", "models", "run"},
    "study": {"_extras", "checkpoint", "data", "evaluate", "losses", "models", "output", "report", "run"},
    "integrations": {"compat", "data", "distributed", "losses", "model_loss", "models", "optim"},
    "": {"functional", "losses", "model_loss", "models", "optim", "patching", "plan", "run"},
    "commands": {"", "_extras", "checkpoint", "data", "distributed", "durability", "evaluate", "hub", "losses", "models",
                 "output", "plan", "presets", "report", "run", "study", "tasks"},
    "cli": {"", "_extras", "checkpoint", "commands", "distributed", "hub", "output", "run"},
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
    "tests.kernels.test_head_ops": {"_head.custom_ops", "_head.registry", "_head.rows"},
    "tests.kernels.test_kl_divergence": {"_head.rows"},  # kernels and their stand-ins in PyTorch, by one name
    "tests.kernels.test_linear_loss": {"_head.gradients", "_head.rows", "_head.sweeps"},
    "tests.kernels.test_rounding": {"_launch"},  # launches kernels of its own
    "tests.kernels.test_sophia_step": {"_compiled", "_launch", "_table", "reference._blocks"},
    "tests.kernels.test_table": {"_table"},
    "tests.kernels.test_token_draw": {"_head.rows"},
    "tests.kernels.test_token_logprob": {"_head.rows"},
    "tests.ptx.test_ptx_faults": {"_table"},
    "tests.test_functional": {"reference._rows"},
    "tests.test_layout": {"_versions"},
}
# Private attributes of objects that are not ours -> why `soul` needs them. It uses no others.
FOREIGN_PRIVATE = {
    "_ActionsContainer": "what add_argument_group and the parser have in common; argparse has no public name for it",
    "_actions": "argparse lists the options of a parser nowhere else",
    "_compiled_call_impl": "torch has no public way back from Module.compile, nor to ask whether a module is compiled",
    "_disable_dynamo": "as in torch.optim: torch.compiler.disable imports the compiler, which takes longer than torch",
    "_dynamo": "torch.compiler.config has not the option about side effects within a checkpoint",
    "_exit": "os._exit, which documents it",
    "_foreach_add_": "one launch for a list of tensors, as in torch.optim",
    "_foreach_zero_": "the same",
    "_fsdp_flattened": "the mark that FSDP1 leaves on parameters",
    "_getframe": "sys._getframe, which documents it",
    "_is_stateful": "transformers' mark of recurrent models",
    "_no_split_modules": "transformers names the classes of a model's layers nowhere else",
    "_orig_mod": "the mark of a module that torch.compile has wrapped",
    "_profiler_enabled": "torch has no public way to ask whether a profiler runs",
    "_supports_attention_backend": "transformers' mark of models whose attention is a plain function of mask and states",
    "_replace": "public in a NamedTuple",
    "_torchdynamo_orig_callable": "the mark of a function that torch.compile has wrapped",
}


Modules = dict[str, ast.Module]  # dotted name -> syntax tree


class Import(NamedTuple):
    """One name that a module imports: a module, or a ``name`` out of one."""

    importer: str
    module: str
    name: str | None
    line: int


def read_modules(root: pathlib.Path) -> Modules:
    """Parse every module of the packages under ``root``."""
    return {module_name(path.relative_to(root)): ast.parse(path.read_text())
            for package in PACKAGES for path in (root / package).rglob("*.py")}  # fmt: skip


@functools.cache
def nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """Return all nodes of a tree, which every rule looks at."""
    return tuple(ast.walk(tree))


def module_name(path: pathlib.Path) -> str:
    """Return the dotted name of a module from its path within the repository."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(modules: Modules) -> Iterator[Import]:
    """List the imports of our own modules, wherever in a file they stand."""
    for importer, tree in modules.items():
        for node in nodes(tree):
            if isinstance(node, ast.Import):
                yield from (Import(importer, name.name, None, node.lineno) for name in node.names if name.name in modules)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for name in node.names:
                    submodule = f"{node.module}.{name.name}"
                    if submodule in modules:
                        yield Import(importer, submodule, None, node.lineno)
                    elif node.module in modules:
                        yield Import(importer, node.module, name.name, node.lineno)


def wrong_arrows(modules: Modules) -> list[str]:
    """List the imports that run upwards: between packages, between wings of ``soul``, and out of the reference."""
    wrong = []
    for importer, module, name, line in imports(modules):
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


def private_imports(modules: Modules) -> list[str]:
    """List the imports of private modules and names of ``soul_kernels`` by others, but for tests of the module itself."""
    wrong = []
    for importer, module, name, line in imports(modules):
        if importer.startswith("soul_kernels") or not module.startswith("soul_kernels"):
            continue
        inner = module.removeprefix("soul_kernels").removeprefix(".")
        if inner in PRIVATE.get(importer, ()):
            continue
        parts = [*inner.split("."), name or ""]
        if any(part.startswith("_") and not part.startswith("__") for part in parts):
            wrong.append(f"{importer}:{line} imports {module}{f' ({name})' if name else ''}")
    return wrong


def friend_access(modules: Modules) -> list[str]:
    """List the places where ``soul`` reaches into the private attributes of another object than ``self`` and ``cls``.

    Who needs such an attribute gets a method or an attribute without underscore, documented. ``getattr`` and its kin count.
    """
    wrong = []
    for name, tree in modules.items():
        if name.partition(".")[0] != "soul":
            continue
        for node in nodes(tree):
            attribute = _private_attribute(node)
            if attribute is not None and attribute not in FOREIGN_PRIVATE:
                wrong.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    return wrong


def _private_attribute(node: ast.AST) -> str | None:
    """Return the private attribute of another object that an expression reads or writes, or None."""
    if isinstance(node, ast.Attribute):
        owner, attribute = node.value, node.attr
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr", "delattr"):
        owner, attribute = node.args[0], getattr(node.args[1], "value", "")
    else:
        return None
    is_private = isinstance(attribute, str) and attribute.startswith("_") and not attribute.startswith("__")
    return attribute if is_private and ast.unparse(owner) not in ("self", "cls", "super()") else None


def circles(modules: Modules) -> list[list[str]]:
    """List the groups of modules that import each other in a circle."""
    targets: dict[str, set[str]] = {name: set() for name in modules}
    for importer, module, _, _ in imports(modules):
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


def without_annotations(modules: Modules) -> list[str]:
    """List the functions of the library and the benchmarks that lack an annotation; ``@triton.jit`` functions need none."""
    lacking = []
    for name, tree in modules.items():
        if name.partition(".")[0] == "tests":
            continue
        for node in nodes(tree):
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

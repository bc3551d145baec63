"""Run tests in many environments, and write what passed into docs/testing.md: `make matrix`, `make matrix ROWS="py310 oldest"`.

A row is an environment, a selection of test files, and what else differs: variables, the search path, the user. uv makes the
environments, `.venv-matrix/<name>`, and finds the interpreters; rows that only change the surroundings share one. A row whose
Python or processor is not to be had is skipped, and its line in the table stays as it was. To add a row, add it to ROWS.
"""

import ast
import datetime
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / ".venv-matrix"
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- /matrix -->"
PACKAGES = ("torch", "triton", "transformers", "bitsandbytes")
COLUMNS = ("row", "what differs", "Python", *PACKAGES, "passed", "failed", "skipped", "seconds", "date", "processor")
NUMBERS = ("tests/test_losses.py", "tests/optim/test_optimizer.py", "tests/kernels/test_token_draw.py", "tests/models")
SELECTION = (*NUMBERS, "tests/kernels/test_compiled.py", "tests/commands/test_cli.py")
COMPILERS = re.compile(r"(.+-)?(gcc|g\+\+|cc|c\+\+|c89|c99|cpp|clang|clang\+\+|tcc|icx|icpx)(-[\d.]+)?")
NOBODY = 65534
PIP_TO_UV = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS",
             "constraint": "UV_CONSTRAINT"}  # fmt: skip


class Unavailable(Exception):
    """A Python or a processor that is not to be had here."""


@dataclass(frozen=True)
class Environment:
    """What uv installs: ``resolution`` as uv names it, ``without``: removed afterwards, ``system``: any user may run it."""

    python: str
    resolution: str = "highest"
    without: tuple[str, ...] = ()
    system: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table. ``flag`` is a feature that the processor must have, as Linux names it."""

    differs: str
    environment: str
    tests: tuple[str, ...] = SELECTION
    variables: dict[str, str] = field(default_factory=dict)
    n_processes: int = 2
    flag: str = ""
    without_compiler: bool = False
    other_user: bool = False


ENVIRONMENTS = {f"py3{minor}": Environment(f"3.{minor}") for minor in (10, 11, 12, 13, 14)} | {
    "oldest": Environment("3.10", resolution="lowest-direct"),
    "no-triton": Environment("3.13", without=("triton",)),
    "other-user": Environment(">=3.10", system=True),
}
ROWS = {f"py3{minor}": Row(f"newest versions, Python 3.{minor}", f"py3{minor}") for minor in (10, 11, 12, 13, 14)} | {
    "oldest": Row("oldest versions of setup.py", "oldest"),
    "no-triton": Row("Triton is not installed", "no-triton"),
    "no-compiler": Row("no C or C++ compiler", "py311", without_compiler=True),
    "other-user": Row("not root; checkout and home are read-only, `TRITON_CACHE_DIR` is not", "other-user", other_user=True),
}
for name, variable, value, flag in [
    ("aten-default", "ATEN_CPU_CAPABILITY", "default", ""),
    ("aten-avx2", "ATEN_CPU_CAPABILITY", "avx2", "avx2"),
    ("aten-avx512", "ATEN_CPU_CAPABILITY", "avx512", "avx512f"),
    ("onednn-avx2", "ONEDNN_MAX_CPU_ISA", "AVX2", "avx2"),
    ("onednn-avx512", "ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "avx512f"),
    ("onednn-bf16", "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", "avx512_bf16"),
]:
    ROWS[name] = Row(f"`{variable}={value}`", "py311", NUMBERS, {variable: value}, flag=flag)
for number in ("1", "2"):  # one process of tests: those of pytest-xdist take one thread each, whatever the variable says
    ROWS[f"threads-{number}"] = Row(f"`OMP_NUM_THREADS={number}`", "py311", NUMBERS, {"OMP_NUM_THREADS": number}, n_processes=0)


def uv_variables() -> dict[str, str]:
    """Return the variables with which uv finds packages where pip finds them, and each version of Python that pyenv has."""
    variables = dict(os.environ)
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    for line in sorted(listed.splitlines()):  # those of the environment, ":env:", come first, as they do for pip
        option, _, value = line.partition("=")
        if name := PIP_TO_UV.get(option.rpartition(".")[2]):
            variables.setdefault(name, ("," if name == "UV_FIND_LINKS" else " ").join(ast.literal_eval(value).split()))
    if shutil.which("pyenv"):
        versions = subprocess.run(["pyenv", "versions", "--bare"], check=True, capture_output=True, text=True).stdout
        variables["PYENV_VERSION"] = ":".join(versions.split())
    return variables


def prepare(name: str) -> pathlib.Path:
    """Return the Python of an environment, which is made if setup.py is newer."""
    environment, folder = ENVIRONMENTS[name], FOLDER / name
    python, installed = folder / "bin" / "python", folder / "installed"
    if installed.exists() and installed.stat().st_mtime > (ROOT / "setup.py").stat().st_mtime:
        return python
    uv, variables = str(pathlib.Path(sys.executable).with_name("uv")), uv_variables()
    command = [uv, "venv", "--quiet", "--clear", "--seed", "--python", environment.python, str(folder)]
    if environment.system:  # an interpreter in somebody's home directory is for that user
        variables["PATH"] = os.defpath
        command.append("--no-managed-python")
    if subprocess.run(command, env=variables).returncode:
        raise Unavailable(f"no Python {environment.python}")
    install = [uv, "pip", "install", "--quiet", "--python", str(python), "--resolution", environment.resolution]
    subprocess.run([*install, "--editable", ".[all,test]"], cwd=ROOT, env=variables, check=True)
    if environment.without:
        subprocess.run([uv, "pip", "uninstall", "--quiet", "--python", str(python), *environment.without], check=True)
    installed.touch()
    return python


def path_without_compilers(folder: pathlib.Path) -> str:
    """Return a search path with links to all programs but compilers."""
    for directory in os.get_exec_path():
        for program in pathlib.Path(directory).iterdir() if os.path.isdir(directory) else ():
            if not COMPILERS.fullmatch(program.name) and not os.path.lexists(folder / program.name):
                (folder / program.name).symlink_to(program)
    return str(folder)


def read_only_checkout(folder: pathlib.Path) -> pathlib.Path:
    """Copy what git knows of the checkout to where nobody may write."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    subprocess.run(["chmod", "-R", "a-w,a+rX", str(folder)], check=True)
    return folder


def run(name: str, row: Row) -> tuple[dict[str, str], bool]:
    """Run the tests of a row, and return its line and whether all passed."""
    features = pathlib.Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    if row.flag and row.flag not in features.split():
        raise Unavailable(f"this processor has no {row.flag}")
    python = prepare(row.environment)
    with tempfile.TemporaryDirectory() as made:
        scratch, where = pathlib.Path(made), ROOT
        scratch.chmod(0o755)
        for subfolder in ("tmp", "home", "checkout", "bin"):
            (scratch / subfolder).mkdir()
        (scratch / "tmp").chmod(0o1777)
        variables = {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(scratch / "tmp"), **row.variables}
        report = scratch / "tmp" / "report.xml"
        command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "-n", str(row.n_processes), "--dist", "loadfile"]
        command += ["--no-loadscope-reorder", f"--junit-xml={report}", *row.tests]
        if row.without_compiler:
            variables["PATH"] = path_without_compilers(scratch / "bin")
        if row.other_user:
            where = read_only_checkout(scratch / "checkout")
            (scratch / "home").chmod(0o555)
            variables |= {"HOME": str(scratch / "home"), "TRITON_CACHE_DIR": str(scratch / "tmp" / "triton")}
            if os.geteuid() == 0:
                command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *command]
        inherited = {key: value for key, value in os.environ.items() if not (row.without_compiler and key in ("CC", "CXX"))}
        words = shlex.join(["env", *(f"{key}={value}" for key, value in variables.items()), *command])
        print(f"\n{name}: {row.differs}", flush=True)
        began = time.monotonic()
        status = subprocess.run(command, cwd=where, env=inherited | variables).returncode
        seconds = time.monotonic() - began
        suite = next(xml.etree.ElementTree.parse(report).iter("testsuite")).attrib if report.exists() else {"errors": "1"}
        subprocess.run(["chmod", "-R", "u+w", str(scratch)], check=True)  # which the superuser does not need
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    if status or failed:
        print(f"{name}: ended with status {status}: {words}", file=sys.stderr)
    code = "import sys, importlib.metadata as m\nhere = {d.name.lower(): d.version for d in m.distributions()}\n"
    code += f"print(sys.version.split()[0], *(here.get(name, '-') for name in {PACKAGES}))"
    versions = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    passed = max(0, count["tests"] - failed - count["skipped"])
    numbers = [str(number) for number in (passed, failed, count["skipped"], round(seconds))]
    line = [name, row.differs, *versions, *numbers, datetime.date.today().isoformat(), processor(features)]
    return dict(zip(COLUMNS, line)), status == 0 and passed > 0


def processor(features: str) -> str:
    """Return the name of the processor's model."""
    model = re.search(r"^model name\s*: (.+)$", features, re.MULTILINE)
    return f"{model[1].strip() if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def write(line: dict[str, str]) -> None:
    """Put a line into the table, in place of the older one of that row."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = {cells[1].strip(): cells[1:-1] for cells in (old.split("|") for old in table.splitlines()) if len(cells) > 2}
    lines[line["row"]] = [f" {line[column]} " for column in COLUMNS]
    header = ["|" + "|".join(f" {column} " for column in COLUMNS) + "|", "|" + "---|" * len(COLUMNS)]
    body = ["|" + "|".join(lines[name]) + "|" for name in ROWS if name in lines]
    PAGE.write_text(before + BEGIN + "\n".join([*header, *body]) + "\n" + END + after)


def main(names: list[str]) -> int:
    """Run the named rows, or all."""
    if unknown := [name for name in names if name not in ROWS]:
        sys.exit(f"ROWS: expected some of {' '.join(ROWS)}; got {' '.join(unknown)}")
    failed = []
    for name in names or ROWS:
        try:
            line, good = run(name, ROWS[name])
        except Unavailable as reason:
            print(f"{name}: skipped: {reason}")
            continue
        write(line)
        if not good:
            failed.append(name)
    print(f"failed: {' '.join(failed)}" if failed else "no row failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

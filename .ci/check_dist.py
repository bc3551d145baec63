"""Check what `make dist` has built: `python .ci/check_dist.py dist`.

A line for every file that is missing or does not belong there, and then the exit status is 1.

The wheel must hold the tracked files of both packages and its own metadata, the source distribution the same files and what is
needed to build the wheel.
"""

import pathlib
import subprocess
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("soul", "soul_kernels")
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
BUILD_FILES = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}
MUST_HAVE = {"soul/py.typed", "soul_kernels/py.typed", "soul/integrations/open_unlearning/configs/trainer/SOULNPO.yaml"}


def package_files() -> set[str]:
    """Return the tracked files of both packages that exist, as paths from the root."""
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def wheel_files(path: pathlib.Path) -> set[str]:
    """Return the names in a wheel, metadata as ``METADATA/<name>``."""
    names = {name for name in zipfile.ZipFile(path).namelist() if not name.endswith("/")}
    metadata = f"{'-'.join(path.name.split('-')[:2])}.dist-info/"
    return {f"METADATA/{name.removeprefix(metadata)}" if name.startswith(metadata) else name for name in names}


def source_files(path: pathlib.Path) -> set[str]:
    """Return the names in a source distribution, without its top directory and the metadata of setuptools."""
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    return {name for name in names if not name.startswith("soul_kernels.egg-info/")}


def differences(path: pathlib.Path, actual: set[str], expected: set[str]) -> list[str]:
    """Return a line for every file of a distribution that is missing, and for every one that does not belong there."""
    missing = [f"{path.name}: {name} is missing" for name in sorted(expected - actual)]
    return missing + [f"{path.name}: {name} does not belong there" for name in sorted(actual - expected)]


def main(folder: str) -> int:
    """Check the wheel and the source distribution in a folder, and return the exit status."""
    (wheel,) = pathlib.Path(folder).glob("*.whl")
    (source,) = pathlib.Path(folder).glob("*.tar.gz")
    expected = package_files() | MUST_HAVE
    problems = differences(wheel, wheel_files(wheel), expected | {f"METADATA/{name}" for name in METADATA})
    problems += differences(source, source_files(source), expected | BUILD_FILES)
    print("\n".join(problems) or f"{wheel.name} and {source.name}: {len(expected)} files of the packages, and nothing else")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

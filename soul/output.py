"""The output directory of a command."""

import pathlib

from soul_kernels._checks import argument_error

RUN_FILE = "soul_config.json"  # by which the command knows an output directory of its own
DATA_FILE = "data.json"  # what became of the rows


def check_output(directory, resume=False):
    """Returns the path of an output directory that does not exist yet or is empty; creates nothing.

    Args:
        directory: path of the directory.
        resume: it may also be that of a run of the ``soul unlearn`` command, which is to go on.

    Raises:
        ArgumentError: there is something in it.
    """
    directory = pathlib.Path(directory)
    above = next((parent for parent in directory.absolute().parents if parent.exists()), directory)
    if not above.is_dir():
        raise argument_error("output", "a new or an empty directory", f"a path below the file {above}", "choose another one")
    if resume and (directory / RUN_FILE).is_file():
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if resume:
            got = f"{directory} without {RUN_FILE}"
            raise argument_error("resume", "the output directory of a run, or a new one", got, "check --output")
        raise argument_error("output", "a new or an empty directory", str(directory), "choose another one, or remove it")
    return directory

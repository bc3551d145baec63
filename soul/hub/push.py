"""Upload of a saved model to the Hugging Face Hub, by huggingface_hub and with its own login.

The token is the one that ``hf auth login`` has stored, or ``HF_TOKEN``. It is no argument here, so that it ends up in no
history of a shell. `check_repository` and `open_repository` ask the hub before a long run whether its result could be pushed.
`upload` then sends one commit, so that the repository never has half of a model. `publish` does all of this for a model that is
there already.

Safe to change: messages. Not safe: ``FILES``, since whatever it matches is published.
"""

import json
import os
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from soul._extras import require
from soul.hub.card import has_card, hub_name, without_directories, write_card
from soul.output.directory import CARD_FILE, REPORT_FILES
from soul.output.progress import task
from soul_kernels.errors import ArgumentError, argument_error

ADAPTERS = "adapter_config.json"
# What transformers and peft save of a model, adapters and a tokenizer. Everything else in the directory stays at home.
FILES = (
    CARD_FILE, "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    ADAPTERS, "adapter_model*.safetensors", "adapter_model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
LATER = "check the network, or push later with: soul push"


class NotPushed(OSError):
    """A saved model could not be pushed to the hub; the message says how to push it again."""


def check_repository(name: str, repository: str) -> str:
    """Return the full name of a repository, after checking its form and the login; nothing is created.

    Args:
        name: argument to name in errors.
        repository: OWNER/NAME, or NAME in the account of the login.

    Raises:
        ArgumentError: it is no name of a repository, ``HF_HUB_OFFLINE`` is set, nobody is logged in, or the hub does not
            answer.
        MissingExtra: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", "hf")
    utils = require("huggingface_hub.utils", "hf")
    try:
        utils.validate_repo_id(repository)
    except utils.HFValidationError:
        remedy = "use letters, digits, '-', '_' and '.', as in me/model-unlearned"
        raise argument_error(name, "OWNER/NAME, a repository on the hub", repr(repository), remedy) from None
    if require("huggingface_hub.constants", "hf").HF_HUB_OFFLINE:
        raise argument_error(name, "a hub that may be reached", "HF_HUB_OFFLINE", "unset it, or leave the option out")
    try:
        account = hub.HfApi().whoami()
    except Exception as error:
        raise _refused(name, error) from error
    return repository if "/" in repository else f"{account['name']}/{repository}"


def open_repository(name: str, repository: str, private: bool = False) -> None:
    """Create a repository unless it exists, and make sure that this login may write there.

    Args:
        name: argument to name in errors.
        repository: full name, from `check_repository`.
        private: whether only its owner may see it. Otherwise a new repository is what the account's settings say.

    Raises:
        ArgumentError: the login may not create the repository or write there; or ``private`` was asked for, and the repository
            exists and is public.
    """
    hub = require("huggingface_hub", "hf")
    api = hub.HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        is_private = api.repo_info(repository).private
        # The hub answers this question, how a file would be uploaded, only to those who may write. Nothing is uploaded.
        api.preupload_lfs_files(repository, additions=[hub.CommitOperationAdd(CARD_FILE, b"-")])
    except Exception as error:
        raise _refused(name, error, repository) from error
    if private and not is_private:
        remedy = "make it private in its settings, or choose another name"
        raise argument_error(name, "a private repository", f"{repository}, which exists and is public", remedy)


def upload(directory: pathlib.Path, repository: str, *, report: bool = False) -> str:
    """Upload the model in a directory, with its card, as one commit, and return the address of the repository.

    Files of another model under names in ``FILES``, which an earlier push has left in the repository, are removed by the
    same commit.

    Args:
        directory: an output directory; nothing in it is changed.
        repository: full name; must exist.
        report: whether the report goes up as well. It quotes rows that were to be forgotten.

    Raises:
        NotPushed: whatever went wrong.
    """
    hub = require("huggingface_hub", "hf")
    api = hub.HfApi()
    try:
        contents = {path.relative_to(directory).as_posix(): _content(path) for path in files_to_push(directory, report)}
        stale = {name for name in api.list_repo_files(repository) if _is_ours(name)} - contents.keys()
        operations = [hub.CommitOperationAdd(name, content) for name, content in contents.items()]
        operations += [hub.CommitOperationDelete(name) for name in sorted(stale)]
        with task("push to the hub"):
            api.create_commit(repository, operations, commit_message="Upload a model of soul-kernels")
    except Exception as error:  # of the hub, the network or a library: the model is saved, and nothing else is lost
        again = f"soul push {shlex.quote(str(directory))} {repository}"
        where = f"the model is saved in {directory}, and was not pushed to {repository}"
        raise NotPushed(f"{where} ({_reason(error)}); push it again: {again}") from error
    return f"{api.endpoint}/{repository}"


def publish(
    directory: pathlib.Path,
    repository: str,
    *,
    private: bool = False,
    report: bool = False,
    options: Mapping[str, Any] | None = None,
    name: str = "repository",
) -> str:
    """Push the model of a run that has ended, and return the address of the repository.

    Args:
        directory: the output directory. It gets a card if it has none.
        repository: OWNER/NAME, or NAME in the account of the login.
        private: as in `open_repository`.
        report: as in `upload`.
        options: options of the run that ``soul_config.json`` does not have, for the card.
        name: argument to name in errors.

    Raises:
        ArgumentError: as `check_repository` and `open_repository`.
        MissingExtra: huggingface_hub is not installed.
        NotPushed: the upload has failed.
        OSError: the card could not be written.
    """
    repository = check_repository(name, repository)
    open_repository(name, repository, private)
    if not has_card(directory):
        write_card(directory, options=options)
    return upload(directory, repository, report=report)


def files_to_push(directory: pathlib.Path, report: bool = False) -> list[pathlib.Path]:
    """Return the files that go up, by name; links are left out, since they could lead to any file."""
    patterns = (*FILES, *REPORT_FILES) if report else FILES
    paths = {path for pattern in patterns for path in directory.glob(pattern)}
    return sorted(path for path in paths if path.is_file() and not path.is_symlink() and not path.parent.is_symlink())


def _is_ours(name: str) -> bool:
    """Tell whether a file in a repository is one that a push writes."""
    path = pathlib.PurePosixPath(name)
    return any(len(path.parts) == len(pathlib.PurePosixPath(pattern).parts) and path.match(pattern) for pattern in FILES)


def _content(path: pathlib.Path) -> str | bytes:
    """Return the path of a file to be uploaded; of adapters' options, their text without a directory of this machine."""
    if path.name != ADAPTERS:
        return os.fspath(path)
    config = json.loads(path.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and hub_name(base) is None:  # "./": so that no model of this name on the hub stands in for it
        config["base_model_name_or_path"] = f"./{without_directories(base)}"
    return json.dumps(config, indent=2).encode()


def _refused(name: str, error: Exception, repository: str | None = None) -> ArgumentError:
    """Return the error for what went wrong before anything was uploaded."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if type(error).__name__ == "LocalTokenNotFoundError":
        return argument_error(name, "a login at the hub", "none", "run: hf auth login, or set HF_TOKEN")
    if status == 401:
        return argument_error(name, "a valid login at the hub", _reason(error), "run: hf auth login, or correct HF_TOKEN")
    if repository is not None and status in (403, 404):
        remedy = "take a token that may write, or a repository of your own"
        return argument_error(name, f"a login that may write to {repository}", _reason(error), remedy)
    return argument_error(name, "an answer of the hub", _reason(error), LATER)


def _reason(error: Exception) -> str:
    """Return an error of huggingface_hub, or of the network below it, on one line."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # "Error while uploading ..."
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(error).__name__]
    return f"status {status}: {lines[0]}" if status and str(status) not in lines[0] else lines[0]

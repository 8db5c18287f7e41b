"""Folders onto the Hub, each push one commit: selectors with their cards, and reports."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_session

from .. import __version__
from .cards import FIGURES, LOG_FILE, REPORT_FILE, STAGES, selector_card


logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
# a pickle, in which the token of `hub_token` stands in clear
NEVER_SENT = ("training_args.bin",)
_OF_A_REPORT = ("report.*", "results.json", "picks.json", "*.png")


# seconds that a Hub may be silent within a request; the client itself would wait for ever
SILENCE = 120.0


def hub_api() -> HfApi:
    """A client of the Hub at `HF_ENDPOINT` that says which library it serves, and does not wait for ever."""
    session = get_session()  # shared by all of `huggingface_hub`; a limit that somebody has set stays
    if session.timeout.read is None:
        session.timeout = SILENCE
    return HfApi(library_name="lever_grpo", library_version=__version__)


def files_of(folder: Path, pattern: str = "*") -> dict[str, Path]:
    """The files of a folder by their path in it (`"**/*"` for those below it too), but for hidden ones and
    `NEVER_SENT`."""
    found = {path.relative_to(folder): path for path in sorted(folder.glob(pattern)) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if name.name not in NEVER_SENT and not any(part.startswith(".") for part in name.parts)
    }


def commit_files(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    message: str,
    *,
    repo_type: str = "model",
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """One commit with all files, by their path in the repository, which must exist. Gives the commit's address."""
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    commit = hub_api().create_commit(
        repo_id, operations, commit_message=message, repo_type=repo_type, token=token, revision=revision
    )
    return commit.commit_url


def push_selector(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """
    Pushes a selector with its card; of a run's output folder the last selector, the report and the figures too.

    Args:
        folder (`str` or `Path`):
            Folder of a selector, or output folder of a run.
        repo_id (`str`):
            Model repository, made if it is not there.
        private (`bool`, *optional*):
            Whether a repository that is made is private. By default it is as the account says, which mostly is public.
        token (`str`, *optional*):
            By default the one of `hf auth login`, or of `HF_TOKEN`.
        revision (`str`, *optional*):
            Branch.

    Returns:
        `str`: address of the repository.

    Raises:
        ValueError: if there is no selector in the folder.

    A `README.md` beside the selector is sent as it is; without one the card is generated, and where that fails, the
    selector goes without a card, and a warning says so.

    Example:

    ```python
    >>> from lever_grpo.hub import push_selector
    >>> push_selector("outputs/mine", "me/my-selector")  # doctest: +SKIP
    'https://huggingface.co/me/my-selector'

    ```
    """
    run, selector = Path(folder), find_selector(Path(folder))
    repo = hub_api().create_repo(repo_id, private=private, token=token, exist_ok=True)
    files: dict[str, Path | bytes] = dict(files_of(selector))
    if selector != run:
        files |= {path.name: path for name in _files_of_a_run() if (path := run / name).exists()}
    if CARD_FILE not in files:
        try:
            files[CARD_FILE] = str(selector_card(selector, repo.repo_id, run=run)).encode()
        except Exception as error:  # whatever is wrong with the card, the selector is not to stay behind
            logger.warning("%s goes to the Hub without a card, which failed: %r", selector, error)
    commit_files(repo.repo_id, files, f"{selector.name} of lever_grpo {__version__}", token=token, revision=revision)
    return str(repo)


def push_report(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    path_in_repo: str | None = None,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """
    Pushes the report of a run or of an evaluation: tables, figures, what was chosen, and the page to browse.

    Args:
        folder (`str` or `Path`):
            Where `report.json` is.
        repo_id (`str`):
            Mostly the repository of the selector; made if it is not there.
        path_in_repo (`str`, *optional*):
            Folder there; by default the name of the local one.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"` or `"dataset"`.
        private, token:
            As in [`push_selector`].

    Returns:
        `str`: address of the repository.

    Raises:
        ValueError: if there is no report.

    Reports are sent as they are, with the names of files that the run was given.

    Example:

    ```python
    >>> from lever_grpo.hub import push_report
    >>> push_report("outputs/evaluation", "me/my-selector")  # doctest: +SKIP
    'https://huggingface.co/me/my-selector'

    ```
    """
    root = Path(folder)
    if not (root / REPORT_FILE).exists():
        raise ValueError(f"{root}: expected a report, found no {REPORT_FILE}; name the output folder of a run.")
    there = root.absolute().name if path_in_repo is None else path_in_repo
    found = sorted({path for pattern in _OF_A_REPORT for path in (*root.glob(pattern), *root.glob(f"*/*/{pattern}"))})
    repo = hub_api().create_repo(repo_id, repo_type=repo_type, private=private, token=token, exist_ok=True)
    files = {Path(there, path.relative_to(root)).as_posix(): path for path in found}
    commit_files(repo.repo_id, files, f"report {there}", repo_type=repo_type, token=token)
    return str(repo)


def push_folder(folder: str | os.PathLike, repo_id: str, *, repo_type: str | None = None, **options: Any) -> str:
    """
    Pushes what lies in a folder: a selector, a run, a beam log or a report.

    Args:
        folder (`str` or `Path`):
            The folder; of a beam log also its file.
        repo_id (`str`):
            Repository, made if it is not there.
        repo_type (`str`, *optional*):
            `"model"` or `"dataset"`; a report can go to either. By default logs are datasets, and all else models.
        **options:
            Of [`push_selector`], [`push_report`] or [`~hub.push_log`].

    Returns:
        `str`: address of the repository.

    Raises:
        ValueError: if there is nothing to push in the folder, or it does not fit the type of repository.
    """
    from .logs import push_log

    path = Path(folder)
    push: Callable[..., str]
    if path.is_file() or (path / "manifest.json").exists():
        push, fits = push_log, "dataset"
    elif "rows" in options:
        raise ValueError(f"{path} is no beam log (a file, or a folder with manifest.json), whose rows could be named.")
    elif _selector_in(path) is not None:
        push, fits = push_selector, "model"
    elif (path / REPORT_FILE).exists():
        return push_report(path, repo_id, repo_type=repo_type or "model", **options)
    else:
        raise ValueError(
            f"{path}: found neither a selector (config.json, or the output of a run), nor a beam log (manifest.json), "
            f"nor a report ({REPORT_FILE}); name the folder of one."
        )
    if repo_type not in (None, fits):
        raise ValueError(f"repo_type={repo_type!r}: {path} goes to a {fits} repository; leave the type out.")
    return push(path, repo_id, **options)


def push_or_warn(push: Callable[[], Any], folder: str | os.PathLike, repo_id: str) -> Any:
    """What `push()` gives; where it fails for whatever reason, `None` and a loud word on how to push later."""
    try:
        return push()
    except Exception as error:  # an outage, a missing token, …: none of it may cost a training
        say_how_to_push(error, folder, repo_id)
        return None


def say_how_to_push(error: BaseException, folder: str | os.PathLike, repo_id: str) -> None:
    """Logs what failed and what to do about it."""
    logger.error(
        "The push to the Hub FAILED (%s). Nothing is lost: all of it is in %s. Push it later with\n"
        "    lever-grpo push %s %s",
        in_words(error),
        folder,
        folder,
        repo_id,
    )


def in_words(error: BaseException) -> str:
    """Kind and message of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def find_selector(folder: Path) -> Path:
    """The folder itself if it is a selector's, or that of the last selector of a run."""
    found = _selector_in(folder)
    if found is None:
        raise ValueError(
            f"{folder}: expected config.json and the weights of a selector, or the output of a run "
            f"({', '.join(STAGES)}), found neither; name such a folder."
        )
    return found


def _selector_in(folder: Path) -> Path | None:
    places = (folder, *(folder / stage for stage in STAGES))
    return next((place for place in places if (place / "config.json").exists()), None)


def _files_of_a_run() -> tuple[str, ...]:
    return (REPORT_FILE, "report.md", "results.json", LOG_FILE, *FIGURES)

"""Everything to the Hub in one commit, so that nobody ever sees a config without its heads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..errors import CheckpointError, UsageError
from ..files import WEIGHTS
from ..modeling.protocol import TorchExitModel
from ..values import unexpected
from .save import CALIBRATION_FILE, Calibrations, save


def push_to_hub(
    model: TorchExitModel,
    repo_id: str,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    calibration: Calibrations = None,
    card: bool | Mapping[str, Any] = True,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model with early exits",
    token: str | bool | None = None,
) -> CommitInfo:
    """Push model, tokenizer, image processor, calibration and card in one commit.

    Weights and a calibration that are there and not pushed again are removed by the same commit; other files stay.

    Args:
        model, tokenizer, image_processor, calibration, card: as in `save`; `card=False` leaves the card on the Hub alone.
        repo_id: "owner/name"; made if it is not there.
        private: of a new repository; the owner's default if `None`.
        revision: branch to push to, made if it is not there; the main branch by default.
        create_pr: propose the commit as a pull request to the main branch.
        commit_message: its first line.
        token: of an account that may write; the one logged in with by default.

    Returns:
        The commit, with its address, and that of the pull request.

    Raises:
        CheckpointError: if the upload fails; its `path` is a folder that holds everything, its message says how to retry.
        UsageError: for `revision` together with `create_pr`, and as in `save`.
    """
    if not isinstance(repo_id, str) or not repo_id:
        raise unexpected("repo_id", repo_id, "owner/name")
    if create_pr and revision is not None:
        raise UsageError("create_pr proposes to the main branch; leave out revision, or push to it.", field="revision")
    home = Path(mkdtemp(prefix="hf_earlyexit-"))
    folder = home / repo_id.rpartition("/")[2]
    try:
        parts = {"tokenizer": tokenizer, "image_processor": image_processor, "calibration": calibration}
        save(model, folder, **parts, card=card, repo_id=repo_id)
    except BaseException:
        shutil.rmtree(home)
        raise
    try:
        commit = _commit(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=commit_message,
            token=token,
        )
    except Exception as error:  # whatever the client or the network raises, the way out is the same
        branch = f" --revision {revision}" if revision is not None else ""
        branch += " --create-pr" if create_pr else ""
        raise CheckpointError(
            f"The model could not be pushed to {repo_id} ({error}). Everything is in {folder}: once the cause is removed, "
            f"push again, or run: hf upload {repo_id} {folder} .{branch}",
            field="repo_id",
            value=repo_id,
            path=folder,
        ) from error
    shutil.rmtree(home)
    return commit


def _commit(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str,
    token: str | bool | None,
) -> CommitInfo:
    """`HfApi.upload_folder` may take several commits; this takes one."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    former_files = api.list_repo_files(repo_id, revision=revision)
    stale = [name for name in former_files if name not in files and (WEIGHTS.fullmatch(name) or name == CALIBRATION_FILE)]
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
    )

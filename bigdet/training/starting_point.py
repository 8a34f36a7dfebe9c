"""Which checkpoint a run goes on from: its newest, here or elsewhere, or the one of another run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from bigdet import distributed
from bigdet.config.load import read_config
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig
from bigdet.engine import checkpoint
from bigdet.engine.remote import Remote
from bigdet.engine.writing import find_disks
from bigdet.host.files import write_text
from bigdet.models.frozen import find_frozen
from bigdet.pieces.index import STATE_FILE, read_state
from bigdet.run_dir import RunDir
from bigdet.training.forks import is_same_request, own_checkpoint
from bigdet.training.saving import newest_checkpoint

logger = logging.getLogger(__name__)


def fetch_newer(config: RunConfig, run_dir: RunDir) -> None:
    """Copy the newest checkpoint of ``checkpoint.remote`` here if it is newer (collective).

    Raises:
        SharedError: it cannot be copied, or there is one although ``resume`` is ``never``.
    """
    if config.checkpoint.remote is None or config.resume not in ("auto", "never"):
        return
    with distributed.together():
        remote = Remote(config.checkpoint.remote)
        if config.resume == "never" and distributed.is_main() and remote.newest() is not None:
            raise ConfigError(
                f"resume: found never, but checkpoint.remote, {remote.address}, has checkpoints. "
                f"Choose another address, remove them, or write resume=auto to continue."
            )
    remote.fetch(run_dir.checkpoints, find_disks(run_dir.checkpoints))
    with distributed.together():
        if distributed.is_main():
            _fetch_frozen(remote, run_dir)


def _fetch_frozen(remote: Remote, run_dir: RunDir) -> None:
    """Copy the frozen backbone of the newest checkpoint here, where it is not yet."""
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return
    run = read_state(newest).get("run", {})
    digest = run.get("frozen")
    if digest is None or find_frozen(run_dir.root, digest, run["phase"]) is not None:
        return
    file = run_dir.frozen(digest)
    logger.info(f"{remote.address}: the frozen backbone is copied to {file}")
    name = str(file.relative_to(run_dir.root))
    try:
        remote.get(name, file)
    except FileNotFoundError as error:
        raise ValueError(
            f"checkpoint.remote: {remote.address} has no {name}, the frozen backbone of the "
            f"checkpoint {newest.name}. Earlier versions did not copy it there: "
            f"copy the folder frozen of its run into {run_dir.root}, and start again."
        ) from error


def find_checkpoint(config: RunConfig, run_dir: RunDir) -> Path | None:
    """Return the checkpoint to continue from, None for a fresh start (rank 0).

    If ``resume`` names a checkpoint of another run, it is copied into the run folder first: later
    starts continue from there. One of this run becomes the latest again.

    Raises:
        ConfigError: the folder holds a finished run, or another run than ``resume`` expects.
    """
    newest = newest_checkpoint(run_dir)
    if run_dir.is_finished or (run_dir.weights.is_file() and newest is None):
        raise ConfigError(
            f"output: {run_dir.root} holds a finished run (it has {run_dir.weights.name}). "
            f"Choose another output, or remove the folder to run again."
        )
    if newest is not None and config.resume == "never":
        raise ConfigError(
            f"resume: found never, but {run_dir.root} has checkpoints. Choose another output, "
            f"remove the folder, or write resume=auto to continue."
        )
    if config.resume in ("auto", "never"):
        return newest
    folder = Path(config.resume)
    if not (folder / STATE_FILE).is_file():
        raise ConfigError(
            f"resume: {folder} is not a checkpoint (it has no {STATE_FILE}). Write "
            f"auto, never, or the path of a checkpoint such as runs/x/checkpoints/train-1000."
        )
    is_new = newest is None or not is_same_request(config, read_config(run_dir.config))
    if (own := own_checkpoint(folder, run_dir)) is not None:
        if is_new:  # asked for the first time
            write_text(run_dir.latest, f"{own.name}\n")
        return own if is_new else newest
    if newest is None:
        checkpoint.adopt(folder.resolve(), run_dir.checkpoints)
        frozen = RunDir(folder.resolve().parents[1]).frozen("").parent
        if frozen.is_dir():
            shutil.copytree(frozen, run_dir.frozen("").parent, dirs_exist_ok=True)
        return newest_checkpoint(run_dir)
    if is_new:
        raise ConfigError(
            f"resume: {run_dir.root} has its own checkpoints, so it cannot begin at {folder}. "
            f"Choose another output, or write resume=auto to continue from {newest}."
        )
    return newest

"""Which checkpoint a run goes on from: its newest, here or elsewhere, or the one of another run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from bigdet import distributed
from bigdet.config.load import parse_config, read_config
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig
from bigdet.engine import checkpoint, keeping
from bigdet.engine.remote import Remote
from bigdet.engine.writing import Disks, find_disks
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
        SharedError: it cannot be copied, or there is one that the run must not go on from.
    """
    if config.checkpoint.remote is None:
        return
    with distributed.together():
        remote = Remote(config.checkpoint.remote)
        is_wanted = (
            distributed.is_main()
            and not run_dir.is_finished  # which will be refused
            and _goes_on_from(remote, config, run_dir)
        )
    if not distributed.broadcast_object(is_wanted):
        return
    disks = find_disks(run_dir.checkpoints)
    is_new = remote.fetch(run_dir.checkpoints, disks)
    with distributed.together():
        if distributed.is_main():
            _fetch_frozen(remote, run_dir)
    _fetch_best(remote, run_dir, disks, is_new)


def _goes_on_from(remote: Remote, config: RunConfig, run_dir: RunDir) -> bool:
    """Tell whether what is at the address is what this run has done so far (rank 0).

    Raises:
        ConfigError: it is of another run, or ``resume`` is ``never``.
    """
    found = remote.newest()
    if found is None or config.resume == "auto":
        return found is not None
    if config.resume == "never":
        raise ConfigError(
            f"resume: found never, but checkpoint.remote, {remote.address}, has checkpoints. "
            f"Choose another address, remove them, or write resume=auto to continue."
        )
    if _is_asked_again(config, run_dir):
        return True
    if _has_own_checkpoints(run_dir):  # of which ``resume`` names one, or it will be refused
        return False
    if not is_same_request(config, parse_config(found[1]["config"], f"{remote.address}: config")):
        raise ConfigError(
            f"resume: found {config.resume}, but checkpoint.remote, {remote.address}, has "
            f"checkpoints of a run that did not begin there. Choose another address, remove them, "
            f"or write resume=auto to continue from them."
        )
    return True


def _is_asked_again(config: RunConfig, run_dir: RunDir) -> bool:
    """Tell whether ``resume`` names the checkpoint at which this run has begun already."""
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return False
    if run_dir.config.is_file():
        return is_same_request(config, read_config(run_dir.config))
    if checkpoint.is_copy(newest):  # the start that copied it was refused or killed
        return False
    before = parse_config(read_state(newest)["config"], f"{newest}: config")
    return is_same_request(config, before)


def _has_own_checkpoints(run_dir: RunDir) -> bool:
    """Tell whether a run folder has checkpoints that were not copied from another run."""
    folders = (run_dir.checkpoints / name for name in keeping.numbers(run_dir.checkpoints))
    return not all(map(checkpoint.is_copy, folders))


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


def _fetch_best(remote: Remote, run_dir: RunDir, disks: Disks, is_new: bool) -> None:
    """Copy the best checkpoint, which the newest names, to where it is not yet (collective).

    It becomes the best here if the newest is new here, or none is yet. Else a later evaluation may
    have chosen another one.
    """
    name = None
    with distributed.together():
        newest = newest_checkpoint(run_dir) if distributed.is_main() else None
        if newest is not None and not checkpoint.is_copy(newest):
            name = read_state(newest).get("run", {}).get("best_checkpoint")
    name = distributed.broadcast_object(name)
    if name is None:
        return
    remote.fetch_one(name, run_dir.checkpoints, disks, only_newer=True)
    with distributed.together():
        folder = run_dir.checkpoints / name
        marked = run_dir.checkpoints / keeping.read_mark(run_dir.checkpoints, "best")
        if distributed.is_main() and (folder / STATE_FILE).is_file():
            if is_new or not (marked / STATE_FILE).is_file():
                keeping.mark_best(folder)
        elif distributed.is_main():
            logger.warning(
                f"{name}, the best checkpoint so far, is neither here nor at {remote.address}: "
                f"until an evaluation gives a higher AP, no checkpoint here is the best"
            )


def find_checkpoint(config: RunConfig, run_dir: RunDir) -> Path | None:
    """Return the checkpoint to continue from, None for a fresh start (rank 0).

    If ``resume`` names a checkpoint of another run, it is copied into the run folder first: later
    starts continue from there, and no longer need the other run. One of this run becomes the
    latest again.

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
    if _is_asked_again(config, run_dir):
        return newest
    folder = Path(config.resume)
    if not (folder / STATE_FILE).is_file():
        raise ConfigError(
            f"resume: {folder} is not a checkpoint (it has no {STATE_FILE}). Write "
            f"auto, never, or the path of a checkpoint such as runs/x/checkpoints/train-1000."
        )
    if (own := own_checkpoint(folder, run_dir)) is not None:  # asked for the first time
        write_text(run_dir.latest, f"{own.name}\n")
        return own
    if _has_own_checkpoints(run_dir):
        raise ConfigError(
            f"resume: {run_dir.root} has its own checkpoints, so it cannot begin at {folder}. "
            f"Choose another output, or write resume=auto to continue from its latest."
        )
    checkpoint.adopt(folder.resolve(), run_dir.checkpoints)
    frozen = RunDir(folder.resolve().parents[1]).frozen("").parent
    if frozen.is_dir():
        shutil.copytree(frozen, run_dir.frozen("").parent, dirs_exist_ok=True)
    return newest_checkpoint(run_dir)

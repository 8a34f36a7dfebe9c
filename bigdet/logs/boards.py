"""Where a run can be watched: TensorBoard, and Weights & Biases if requested.

A board takes numbers and pictures. Resuming and reports read only ``metrics.jsonl``.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bigdet.host.files import write_text

logger = logging.getLogger(__name__)


class Board(Protocol):
    """Shows the progress of a run; exists on rank 0 only.

    Your own is a class (or a function that returns a board) with these three methods, named in
    ``log.boards=[my_package.boards:File]``. It is called once at each start of the run with the
    keyword arguments ``folder`` (an existing folder for its files, in the run folder),
    ``first_step`` (discard what an earlier process showed from this step on) and ``options`` (of
    the config, by full key). Its exceptions end the run.

        class File:
            def __init__(self, folder, first_step, options):
                self.file = open(folder / "log.txt", "a")
            def add_scalars(self, values, step):
                print(step, dict(values), file=self.file, flush=True)
            def add_picture(self, name, picture, step):
                pass
            def close(self):
                self.file.close()
    """

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers.

        Args:
            values: by name, such as ``loss/box``.
            step: optimizer steps over all phases.
        """

    def add_picture(self, name: str, picture: NDArray[np.uint8], step: int) -> None:
        """Show a picture.

        Args:
            name: the same at all steps.
            picture: ``(H, W, 3)`` RGB.
            step: optimizer steps over all phases.
        """

    def close(self) -> None:
        """Write what is not yet written."""


class TensorBoard:
    """Event files that TensorBoard reads."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begin a file.

        Args:
            folder: where the event files go.
            first_step: what an earlier process wrote from this step on is discarded.
        """
        # Imported here: it takes a second and only rank 0 of a training run needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        self._folder, self._has_warned = folder, False

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """See ``Board``."""
        with self._writing():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def add_picture(self, name: str, picture: NDArray[np.uint8], step: int) -> None:
        """See ``Board``."""
        with self._writing():
            self._writer.add_image(name, picture, step, dataformats="HWC")
            self._writer.flush()

    def close(self) -> None:
        """See ``Board``."""
        with self._writing():
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Warn once where the disk is full."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    "%s: cannot be written (%s). TensorBoard may lack what comes until the run is "
                    "started again; metrics.jsonl has it.", self._folder, error,
                )  # fmt: skip
            self._has_warned = True


class WeightsAndBiases:
    """A run of Weights & Biases."""

    def __init__(
        self,
        folder: Path,
        project: str,
        name: str,
        entity: str | None,
        mode: str,
        options: Mapping[str, Any],
    ) -> None:
        """Start a run there, or continue the one that this run folder started.

        Args:
            folder: for its files; the file ``id`` holds the id of the run there.
            project: where the run is listed.
            name: shown for the run.
            entity: user or team; None for the default one.
            mode: ``online`` or ``offline``.
            options: of the config, by full key.

        Raises:
            ValueError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"log.wandb: wandb cannot be imported ({error}). Install it (pip install "
                f"wandb), or set log.wandb=null."
            ) from error
        id_file = folder / "id"
        if not id_file.is_file():
            write_text(id_file, uuid.uuid4().hex[:12])
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=project,
            name=name,
            entity=entity,
            mode=mode,
            dir=str(folder),
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=dict(options),
        )
        # Its own step counter only rises; after a resume some steps are repeated.
        self._run.define_metric("*", step_metric="total_step")

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """See ``Board``."""
        self._run.log({**values, "total_step": step})

    def add_picture(self, name: str, picture: NDArray[np.uint8], step: int) -> None:
        """See ``Board``."""
        self._run.log({name: self._wandb.Image(picture), "total_step": step})

    def close(self) -> None:
        """See ``Board``."""
        self._run.finish()

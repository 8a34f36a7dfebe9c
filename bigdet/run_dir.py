"""The paths of all files in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """The files of one run; nothing is created by asking for a path.

    Attributes:
        root: the folder, ``output`` of the config.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config, which repeats the run."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per logging interval and per evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard."""
        return self.root / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Files of Weights & Biases; ``id`` holds the id of the run there."""
        return self.root / "wandb"

    @property
    def boards(self) -> Path:
        """A folder for each of the user's own boards."""
        return self.root / "boards"

    def board(self, name: str) -> Path:
        """The folder of the board ``package.module:Class``."""
        return self.boards / name.replace(":", ".")

    @property
    def pictures(self) -> Path:
        """Drawn batches and detections."""
        return self.root / "pictures"

    def picture_list(self, phase: str) -> Path:
        """What the pictures of a phase show: a JSON list."""
        return self.pictures / f"{phase}.json"

    @property
    def environment(self) -> Path:
        """Device, ranks and versions of each start: a JSON list."""
        return self.root / "environment.json"

    @property
    def weights(self) -> Path:
        """The final weights in fp32, with config and categories in the metadata."""
        return self.root / "model.safetensors"

    @property
    def is_finished(self) -> bool:
        """Whether it has its final weights, and every evaluation is scored.

        Earlier versions could end a run, on a busy machine, with its last evaluation unscored.
        """
        return self.weights.is_file() and not self.all_detections()

    def frozen(self, digest: str) -> Path:
        """The frozen backbone whose tensors have a hash; checkpoints do not have it."""
        return self.root / "frozen" / f"{digest[:16]}.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.root / "checkpoints"

    @property
    def latest(self) -> Path:
        """A text file with the name of the newest complete checkpoint."""
        return self.checkpoints / "latest"

    @property
    def best(self) -> Path:
        """A text file with the name of the checkpoint of the best box AP."""
        return self.checkpoints / "best"

    @property
    def stop(self) -> Path:
        """A file that asks the run to write a checkpoint and end with exit code 75."""
        return self.root / "stop"

    @property
    def stopped(self) -> Path:
        """A file that says where the run stopped on request; removed when it is started again."""
        return self.root / "stopped"

    @property
    def lock(self) -> Path:
        """Which process trains here: host, process id and start time; see ``host/locks.py``."""
        return self.root / "lock"

    def log(self, rank: int) -> Path:
        """The log file of one rank."""
        return self.root / "logs" / f"rank-{rank}.log"

    def trace(self, phase: str, rank: int) -> Path:
        """What one rank did in the steps of ``log.profile``, for Perfetto."""
        return self.root / "profile" / f"{phase}-rank-{rank}.json.gz"

    def memory_snapshot(self, what: str, rank: int) -> Path:
        """What was in the memory of a rank's GPU, in a phase or when it was full."""
        return self.root / "profile" / f"{what}-rank-{rank}.pickle"

    def checkpoint(self, phase: str, step: int) -> Path:
        """The folder of one checkpoint, ``PHASE-STEP``."""
        return self.checkpoints / f"{phase}-{step}"

    def evaluation(self, phase: str, step: int, prefix: str = "") -> Path:
        """The numbers of one evaluation; ``weights/``: of the weights besides their average."""
        return self.root / "evaluation" / prefix / f"{phase}-{step}.json"

    def detections(self, phase: str, step: int) -> Path:
        """The detections of one evaluation, until they are scored."""
        return self.root / "evaluation" / f"{phase}-{step}.detections"

    def all_detections(self) -> list[Path]:
        """The detections of all evaluations that were not scored."""
        return sorted((self.root / "evaluation").glob("*.detections"))

"""The place of a process among the ranks: from the variables of launchers to those of torch.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
themselves. Here they are made from those of Slurm's ``srun`` and of ``mpirun`` (Open MPI, MPICH,
Intel MPI, MVAPICH, Cray).
"""

from __future__ import annotations

import os
import re
import zlib

import torch

_MPI = (  # rank, number of ranks, rank on this host, ranks on this host
    *(
        tuple(f"{name}_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        for name in ("OMPI", "MV2", "MVP")  # Open MPI, MVAPICH 2 and 3
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # Cray
)
_JOBS = ("PMIX_NAMESPACE", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
"""Variables that differ between the runs of a host and agree in all ranks of a run."""
_STEP = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST")
_FIRST_PORT, _NUM_PORTS = 12_000, 20_000  # below those that Linux assigns itself


def adopt() -> None:
    """Set what torch needs if another launcher started this process as one of several.

    A process that torchrun started inside a task has RANK already.

    Raises:
        ValueError: there are several ranks, and which of them this is is unknown.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() and not _adopt_mpi():
        _adopt_slurm()
    ranks, size = (_count(name, default) for name, default in (("RANK", -1), ("WORLD_SIZE", 1)))
    if ranks == -1 and size > 1:
        raise ValueError(
            f"WORLD_SIZE is {size}, but RANK is not set, so each process would take itself for the "
            f"first. Start all ranks with deepspeed, torchrun, srun or mpirun, or unset WORLD_SIZE "
            f"to train with one process."
        )
    if ranks >= size:
        raise ValueError(
            f"RANK is {ranks}, expected a number below WORLD_SIZE, {size}. Start all ranks with "
            f"deepspeed, torchrun, srun or mpirun, or unset RANK and WORLD_SIZE."
        )
    _count("LOCAL_RANK", 0)


def _adopt_mpi() -> bool:
    """Read the variables of an MPI; False if they do not say that there are several ranks.

    Before Slurm's: ``mpirun`` inside a job starts its own daemons with ``srun``.
    """
    variables = os.environ
    for rank, size, local_rank, local_size in _MPI:
        if _count(size, 1) == 1 and _count(rank, 0) == 0:
            continue
        if size not in variables or rank not in variables:
            known, lacking = (rank, size) if rank in variables else (size, rank)
            raise ValueError(
                f"{known} is {variables[known]}, but {lacking} is not set, so this process does "
                f"not know its place among the ranks. Set RANK, WORLD_SIZE, LOCAL_RANK, "
                f"MASTER_ADDR and MASTER_PORT in each process, or start it with torchrun."
            )
        if local_rank not in variables and not _sees_one_gpu():
            continue  # it is that of another row, or Slurm's
        variables["RANK"], variables["WORLD_SIZE"] = variables[rank], variables[size]
        variables["LOCAL_RANK"] = "0" if _sees_one_gpu() else variables[local_rank]
        hosts = variables.get("SLURM_JOB_NODELIST")
        if variables.get(local_size) == variables[size]:
            variables.setdefault("MASTER_ADDR", "127.0.0.1")
        elif hosts is not None:
            variables.setdefault("MASTER_ADDR", first_host(hosts))
        job = next((variables[name] for name in _JOBS if name in variables), "")
        variables.setdefault(
            "MASTER_PORT", str(_FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS)
        )
        return True
    return False


def _adopt_slurm() -> None:
    """Read the variables of ``srun``.

    Raises:
        ValueError: a launcher gave the job several tasks, and this process is none of them.
    """
    variables = os.environ
    num_tasks = _count("SLURM_NTASKS", 1)
    if _count("SLURM_STEP_NUM_TASKS", num_tasks) == 1:
        names = [name for name in ("PMI_RANK", "PMIX_RANK") if _count(name, 0) > 0]
        names += [size for _, size, *_ in _MPI if _count(size, 1) > 1]
        if names:
            raise ValueError(
                f"{names[0]} is {variables[names[0]]}, so there are several ranks, but their "
                f"number or this one's place on its host is unknown. Set RANK, WORLD_SIZE, "
                f"LOCAL_RANK, MASTER_ADDR and MASTER_PORT in each process, or start it with "
                f"torchrun."
            )
        return
    if "SLURM_STEP_NUM_TASKS" not in variables:
        raise ValueError(
            f"Slurm gave this job {num_tasks} tasks, but python was started without srun and would "
            f"run alone. Write `srun python ...`, or ask for one task."
        )
    if lacking := [name for name in _STEP if name not in variables]:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS is {variables['SLURM_STEP_NUM_TASKS']}, but {lacking[0]} is not "
            f"set, so this process does not know its place among the ranks. Start it with srun."
        )
    variables["RANK"] = variables["SLURM_PROCID"]
    variables["WORLD_SIZE"] = variables["SLURM_STEP_NUM_TASKS"]
    variables["LOCAL_RANK"] = "0" if _sees_one_gpu() else variables["SLURM_LOCALID"]
    variables.setdefault("MASTER_ADDR", first_host(variables["SLURM_STEP_NODELIST"]))
    # Jobs and steps that share a host need ports of their own.
    number = int(variables["SLURM_JOB_ID"]) * 16 + int(variables["SLURM_STEP_ID"])
    variables.setdefault("MASTER_PORT", str(_FIRST_PORT + number % _NUM_PORTS))


def ranks_on_host() -> int:
    """Return how many ranks the launcher says it started on this host; 0 if it does not say."""
    return _count("LOCAL_WORLD_SIZE", 0) or _count("LOCAL_SIZE", 0)  # torchrun's, deepspeed's


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm list such as ``gpu[03-05,9],login1``: ``gpu03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)  # to the first comma outside brackets
    assert first is not None
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def _sees_one_gpu() -> bool:
    """With --gpus-per-task a task sees only its GPU, as number 0."""
    return torch.cuda.is_available() and torch.cuda.device_count() == 1


def _count(name: str, default: int) -> int:
    """Return a whole number from the environment; ``ValueError`` if it is not one."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdecimal():
        raise ValueError(f"{name}: found {text!r}, expected a whole number. Set or unset it.")
    return int(text)

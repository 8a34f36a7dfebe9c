"""What each launcher sets, as its documents and real runs of it say, and what torch then gets."""

import os

import pytest

from bigdet.host import launchers

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "prterun-vm-27704@1",
}
MPICH = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
    "PMI_FD": "9",
}
CRAY = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}
SLURM_JOB = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu[03-04]"}
DAEMON = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[03-04]"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch):
    kinds = ("OMPI_", "PMI", "MPI_", "MV2_", "MVP_", "SLURM_", "PBS_", "LSB_")
    for name in list(os.environ):
        if name in NAMES or name.startswith(kinds):
            monkeypatch.delenv(name)
    monkeypatch.setattr(launchers, "_sees_one_gpu", lambda: False)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what adopt() sets goes with it


def adopted(variables: dict[str, str]) -> dict[str, str]:
    os.environ.update(variables)
    launchers.adopt()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, ()),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, ()),
        ({"SLURM_NTASKS": "1", "PMIX_RANK": "0"}, ()),
        (MPICH, ("1", "2", "1", "127.0.0.1")),  # all on one host
        (OPEN_MPI | SLURM_JOB, ("3", "4", "1", "gpu03")),
        # mpirun's own daemon is task 1 of 2; its ranks are not.
        (OPEN_MPI | SLURM_JOB | DAEMON | STEP, ("3", "4", "1", "gpu03")),
        (OPEN_MPI | {"MASTER_ADDR": "head"}, ("3", "4", "1", "head")),
        (
            {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()} | SLURM_JOB,
            ("3", "4", "1", "gpu03"),
        ),
        (CRAY | SLURM_JOB, ("5", "8", "1", "gpu03")),
        # srun --mpi=pmi2 says no rank on the host; Slurm does.
        ({"PMI_RANK": "1", "PMI_SIZE": "2"} | SLURM_JOB | DAEMON | STEP, ("1", "2", "0", "gpu03")),
        ({"PMIX_RANK": "1"} | SLURM_JOB | DAEMON | STEP, ("1", "2", "0", "gpu03")),
        (MPICH | {"RANK": "0", "WORLD_SIZE": "1"}, ("0", "1")),  # of torchrun, in a task
        (MPICH | {"RANK": "0"}, ("1", "2", "1", "127.0.0.1")),  # the same for all: of no launcher
        (MPICH | {"WORLD_SIZE": "1"}, ("1", "2", "1", "127.0.0.1")),
    ],
)
def test_the_place_among_the_ranks_is_found(variables: dict[str, str], place: tuple[str, ...]):
    found = adopted(variables)
    port = found.pop("MASTER_PORT", None)
    names = NAMES[:2] if len(place) == 2 else NAMES[:4]
    assert found == dict(zip(names, place, strict=False))
    assert (port is not None) == (len(place) == 4)
    assert port is None or 12_000 <= int(port) < 32_000


def test_ranks_of_one_run_get_one_port_and_other_runs_another():
    ports = []
    for rank, job in (("0", "a@1"), ("1", "a@1"), ("0", "b@1")):
        for name in NAMES:
            os.environ.pop(name, None)
        here = {"PMIX_NAMESPACE": job, "OMPI_COMM_WORLD_RANK": rank, "MASTER_ADDR": "head"}
        ports.append(adopted(OPEN_MPI | here)["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


def test_a_task_that_sees_its_own_gpu_alone_takes_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launchers, "_sees_one_gpu", lambda: True)
    assert adopted(MPICH)["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "^WORLD_SIZE is 2, but RANK is not set, so each process would"),
        ({"RANK": "1"}, "^RANK is 1, expected a number below WORLD_SIZE, 1"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "^RANK is 4, expected a number below WORLD_SIZE, 4"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "^RANK: found 'one', expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "^LOCAL_RANK: found '-1'"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "^OMPI_COMM_WORLD_SIZE is 4, but OMPI_COMM_WORLD_RANK is"),
        ({"MV2_COMM_WORLD_RANK": "1"}, "^MV2_COMM_WORLD_RANK is 1, but MV2_COMM_WORLD_SIZE is not"),
        ({"PMI_SIZE": "2"}, "^PMI_SIZE is 2, but PMI_RANK is not set"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "^PMI_RANK is 1, so there are several ranks, but"),
        ({"PMIX_RANK": "1"}, "^PMIX_RANK is 1, so there are several ranks, but"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "^PMI_SIZE is 2, so there are several ranks, but"),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "^OMPI_COMM_WORLD_SIZE is 2, so there are several ranks, but",
        ),
        (DAEMON, "^SLURM_STEP_NUM_TASKS is 2, but SLURM_JOB_ID is not set"),
    ],
)
def test_several_ranks_that_do_not_know_their_place_are_refused(variables, said: str):
    with pytest.raises(ValueError, match=said):
        adopted(variables)

"""The files of launch/: against the published schemas, and their commands as platforms run them.

Neither Kubernetes, SkyPilot, Slurm nor docker is here: what they do is set variables and run a
command on every node, which is done by hand. `launch_schemas.json` says where its schemas are from.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.commands.runs import ROOT, arguments, free_port

LAUNCH = ROOT / "launch"
SCHEMAS = json.loads((Path(__file__).parent / "launch_schemas.json").read_text())
SHORT = ["phases.pretrain.steps=2", "phases.pretrain.warmup_steps=1", "phases.finetune.steps=2"]
QUICK = [*SHORT, "data.workers=0", "log.tensorboard=false", "evaluation.pictures=0"]


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def check(document: dict, schema: str) -> None:
    jsonschema.validate(document, {**SCHEMAS[schema], "$defs": SCHEMAS["$defs"]})


def variables(more: dict[str, object]) -> dict[str, str]:
    plain = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **plain, "PATH": path, **{key: str(v) for key, v in more.items()}}


def run_nodes(commands: list[list[str]], settings: list[dict[str, object]]) -> str:
    """Run a command on every node; return what all print."""
    nodes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables(own),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, own in zip(commands, settings, strict=True)
    ]
    try:
        printed = "".join(node.communicate(timeout=300)[0] for node in nodes)
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0] * len(nodes), printed
    return printed


def test_kubernetes_yaml_fits_the_published_types():
    runtime, job = documents("kubernetes.yaml")
    check(runtime, "TrainingRuntime")
    check(job, "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (part,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = part["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # The names by which Kubeflow Trainer finds the container that trains.
    assert part["name"] == container["name"] == "node"
    label = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert part["template"]["metadata"]["labels"] == label
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    # Variables of this kind are the platform's, which refuses a job that sets them.
    assert not [one for one in job["spec"]["trainer"]["env"] if one["name"].startswith("PET_")]
    assert (ROOT / job["spec"]["trainer"]["args"][0]).is_file()


def test_a_field_that_the_platforms_do_not_know_is_found():
    runtime, job = documents("kubernetes.yaml")
    job["spec"]["trainer"]["nodes"] = 2
    with pytest.raises(jsonschema.ValidationError, match="'nodes' was unexpected"):
        check(job, "TrainJob")
    runtime["spec"]["mlPolicy"]["torch"]["numProcPerNode"] = "all"
    with pytest.raises(jsonschema.ValidationError, match="'all' is not valid"):
        check(runtime, "TrainingRuntime")


def test_the_command_of_the_train_job_trains_on_two_nodes(tmp_path: Path, shapes_shards: Path):
    trainer = documents("kubernetes.yaml")[1]["spec"]["trainer"]
    words = [*trainer["command"], *arguments(tmp_path / "run", shapes_shards, *QUICK)]
    port = free_port()
    settings = [
        {
            "PET_NNODES": 2,
            "PET_NPROC_PER_NODE": 1,
            "PET_NODE_RANK": node,
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
        }
        for node in (0, 1)
    ]
    run_nodes([words, words], settings)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert "2" in re.findall(r'"(?:ranks|world_size)": (\d+)', json.dumps(starts)), starts


def test_skypilot_yaml_fits_the_published_schema_and_its_command_starts_two_nodes(
    tmp_path: Path, shapes_shards: Path
):
    (task,) = documents("skypilot.yaml")
    check(task, "skypilot")
    config, *options = arguments(tmp_path / "run", shapes_shards, *QUICK, "--doctor")
    envs = {
        **task["envs"],
        "CONFIG": config,
        "OPTIONS": " ".join(options),
        "MASTER_PORT": free_port(),
        "SKYPILOT_NUM_NODES": 2,
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        "SKYPILOT_NUM_GPUS_PER_NODE": 1,
    }
    settings = [{**envs, "SKYPILOT_NODE_RANK": node} for node in (0, 1)]
    printed = run_nodes([["bash", "-c", task["run"]]] * 2, settings)
    assert re.search(r"ranks +2 on ", printed), printed
    assert "all is well" in printed


def test_a_slurm_job_that_is_stopped_is_put_into_the_queue_again(
    tmp_path: Path, shapes_shards: Path
):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        # What srun does: the command as two tasks, and the largest of their exit codes.
        "srun": """
            [ "$1 $2" = "--cpus-per-task 8" ] || exit 1
            shift 2
            for rank in 0 1; do
              SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks="$tasks $!"
            done
            code=0
            for task in $tasks; do wait "$task"; own=$?; [ $own -gt $code ] && code=$own; done
            exit $code""",
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol',
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    own = variables(
        {
            "SLURM_JOB_ID": 77,
            "SLURM_CPUS_PER_TASK": 8,
            "SLURM_NTASKS": 2,
            "SLURM_STEP_ID": os.getpid() % 1000,
            "SLURM_STEP_NUM_TASKS": 2,
            "SLURM_STEP_NODELIST": "localhost",
        }
    )
    own["PATH"] = f"{tools}{os.pathsep}{own['PATH']}"
    run = tmp_path / "run"
    words = arguments(run, shapes_shards, *QUICK, "phases.pretrain.steps=100000")
    job = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), *words], cwd=ROOT, env=own)
    try:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").exists():
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (run / "stop").touch()
        assert job.wait(timeout=300) == 75
    finally:
        job.kill()
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    assert (run / "stopped").exists()


def test_shell_scripts_have_no_syntax_errors():
    for script in [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_what_the_dockerfile_copies_is_enough_to_install(tmp_path: Path):
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", "")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip("# ")]
    steps = [step for step in steps if not step[0].startswith("#")]
    assert steps[0][0] == "FROM"
    assert {step[0] for step in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "CMD"}
    folder = tmp_path / "image"
    folder.mkdir()
    for name, rest in steps:
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = folder / target
                place = place / Path(source).name if target.endswith("/") else place
                place.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    ignore = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(
                        ROOT / source, place, symlinks=True, ignore=ignore, dirs_exist_ok=True
                    )
                else:
                    shutil.copy(ROOT / source, place)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run(
        [*build, "--wheel-dir", str(tmp_path)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True
    ).stdout
    for needed in ("bigdet/train.py", "bigdet/configs/swin_t_direct.yaml", "timm_backbones.csv"):
        assert needed in names

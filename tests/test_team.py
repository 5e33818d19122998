"""Several processes that train one model, for real: separate processes, gloo, this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from sdbctl import boxfile, team
from sdbctl.data import Preprocess, batches
from sdbctl.errors import EnvironmentFailure
from tests.conftest import CONCEAL

COMMAND = [sys.executable, "-m", "sdbctl"]
PREPROCESS = Preprocess((0.5,), (0.5,), (1, 8, 8))


def parts_of(images, count, size=32):
    """Every part's batches of one epoch."""
    for part in range(count):
        yield list(
            batches(
                images,
                PREPROCESS,
                batch_size=size,
                device=torch.device("cpu"),
                generator=torch.Generator().manual_seed(3),
                augment="none",
                shuffle=True,
                share=(part, count),
            )
        )


def test_the_parts_of_a_batch_are_equal_and_make_the_whole(splits):
    images = splits.transfer.take(range(101))
    (whole,) = parts_of(images, 1)
    shared = list(parts_of(images, 3))
    # of the last batch each part would get one image, which BatchNorm cannot use
    assert len(whole.pop().y) < 6 <= min(len(batch.y) for batch in whole)
    for batch, *parts in zip(whole, *shared, strict=True):
        left = len(batch.y) % 3
        assert {len(part.y) for part in parts} == {len(batch.y) // 3}
        seen = torch.cat([part.index for part in parts]).sort().values
        assert torch.equal(seen, batch.index[: len(batch.y) - left].sort().values)


def start(*args, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, *map(str, args)], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def losses(text):
    return [float(value) for value in re.findall(r"label (\d\.\d+)", text)]


def test_two_processes_train_like_one(tmp_path):
    common = ("train", "--arch", "cnn", "--data", "digits", "--epochs", 3, "--batch-size", 64, "--precision", "fp32")
    runs = [start(*common, "-o", f"{n}.safetensors", "--devices", n, cwd=tmp_path) for n in (1, 2)]
    (out, one), (out_two, two) = (run.communicate(timeout=300) for run in runs)
    assert [run.returncode for run in runs] == [0, 0], two
    assert out.count("wrote") == out_two.count("wrote") == 1
    assert "2 processes of 32 images each" in two
    assert len(losses(one)) == len(losses(two)) > 5
    # the same images in the same order, shifted at random; without that they agree to the fourth digit, see below
    assert losses(two) == pytest.approx(losses(one), rel=0.25, abs=0.05)
    accuracies = [boxfile.load(tmp_path / f"{n}.safetensors").meta.measured["top1"] for n in (1, 2)]
    assert min(accuracies) > 80
    assert {path.name for path in tmp_path.iterdir()} == {"1.safetensors", "2.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_starts_processes_on_one_machine_or_two(machines, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    each = 2 // machines
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={machines}", f"--nproc-per-node={each}",
                "--master-addr=127.0.0.1", f"--master-port={port}"]  # fmt: skip
    train = ["-m", "sdbctl", "train", "--arch", "cnn", "--data", "digits", "--epochs", "3", "--batch-size", "64",
             "--precision", "fp32", "--device", "cpu", "--devices", str(each), "--nodes", str(machines),
             "-o", "x.safetensors"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={rank}", *train],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(machines)
    ]
    told = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0] * machines, told
    assert sum(out.count("wrote") for out, _ in told) == 1
    assert "2 processes of 32 images each" in told[0][1]
    assert boxfile.load(tmp_path / "x.safetensors").meta.measured["top1"] > 80
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors"}


TRAINS = """
import atexit
import os
import sys
from pathlib import Path

import torch
from torch import nn

from sdbctl import data, team
from sdbctl.boxstep import plain_step
from sdbctl.data import Preprocess
from sdbctl.engine import Engine
from sdbctl.training import fit
from sdbctl.updates import Recipe

processes, device = int(sys.argv[1]), torch.device("cpu")
# in one piece, or what two processes say is mixed up
atexit.register(lambda: os.write(1, f'still connected: {torch.distributed.is_initialized()};'.encode()))
team.expect(processes)
if processes > 1:
    team.join(device, "fp32", processes, 1, "auto")
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
images = data.split(data.load("digits", root=Path("data"))).owner.take(range(250))
recipe = Recipe(epochs=2, batch_size=64, lr=0.1, augment="none")
fit(net, plain_step, images, Preprocess((0.5,), (0.5,), (1, 8, 8)), recipe, Engine(device))
if team.rank() == 0:
    torch.save(net.state_dict(), sys.argv[2])
"""


def test_two_processes_end_like_one(tmp_path):
    """Same images, order, batch statistics, gradients and clipping; sums of halves round differently."""
    (tmp_path / "trains.py").write_text(TRAINS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "trains.py", str(n), f"{n}.pt"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in (1, 2)
    ]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    # a thread of the connection that is left at Python's end aborts a process now and then
    assert [text.count("still connected: False") for text in said] == [1, 2]
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    untrained = nn.Linear(8 * 36, 10).weight
    assert (one["4.weight"] - untrained).abs().mean() > 0.01
    assert (one["1.running_mean"] != 0).all()
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-3), name


@pytest.mark.slow
def test_two_processes_box_and_distil(tmp_path, work):
    box = (*CONCEAL, work / "teacher.safetensors", "--key-file", work / "k.bin", "--data", "digits", "--epochs", 2)
    run = start(*box, "-o", "b.safetensors", "--devices", 2, cwd=tmp_path)
    _, text = run.communicate(timeout=300)
    assert run.returncode == 0, text
    boxed = boxfile.load_box(tmp_path / "b.safetensors")
    assert boxed.meta.measured["boxed_top1"] > 50
    student = ("distill", "b.safetensors", "--student", "cnn-tiny", "--data", "digits", "--epochs", 2)
    run = start(*student, "-o", "s.safetensors", "--devices", 2, cwd=tmp_path)
    _, text = run.communicate(timeout=300)
    assert run.returncode == 0, text
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"b.safetensors", "b.reference.safetensors", "s.safetensors"}


def children(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_in_one_line_and_it_resumes(tmp_path, work):
    common = ("train", "--arch", "cnn", "--data", "digits", "--epochs", 60, "--batch-size", 64, "--devices", 2)
    run = start(*common, "-o", "x.safetensors", cwd=tmp_path)
    state = tmp_path / ".x.resume"
    limit = time.monotonic() + 90
    while not state.exists() and time.monotonic() < limit:
        time.sleep(0.1)
    (other,) = children(run.pid)
    os.kill(other, signal.SIGKILL)
    _, text = run.communicate(timeout=300)
    assert run.returncode == 6
    assert text.splitlines()[-1] == "error: another training process has ended; --resume goes on"
    assert "Traceback" not in text
    assert {path.name for path in tmp_path.iterdir()} == {".x.resume"}
    again = start(*common, "-o", "x.safetensors", "--resume", cwd=tmp_path)
    _, text = again.communicate(timeout=300)
    assert again.returncode == 0
    assert "resumed cnn after epoch" in text
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors"}


def test_what_several_processes_cannot_do_is_said_first(tmp_path, work):
    box = start(
        *CONCEAL, work / "teacher.safetensors", "--key-file", "-", "--devices", 2, "-o", "x.safetensors", cwd=tmp_path
    )
    assert "cannot read the key from standard input" in box.communicate(timeout=300)[1]
    assert box.returncode == 2
    train = start("train", "--data", "digits", "--arch", "cnn", "--devices", 2, "--strategy", "magic", cwd=tmp_path)
    assert "strategy magic cannot be used" in train.communicate(timeout=300)[1]
    assert train.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_machines_that_found_different_states_stop(monkeypatch):
    class Two:
        world_size = 2

        def all_gather(self, number):
            return torch.tensor([number, 3])

    monkeypatch.setattr(team, "_joined", Two())
    team.agree(3, "the state")
    with pytest.raises(EnvironmentFailure, match="the state is not the same on every machine"):
        team.agree(0, "the state")

"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="Data set: a torchvision name, folder:PATH, parquet:PATH, npz:PATH, digits.",
    ),
]
DataRoot = Annotated[Path, typer.Option("--data-root", envvar="SDBCTL_DATA", help="Folder of torchvision data sets.")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision download the data set.")]
ImageSize = Annotated[int | None, typer.Option("--image-size", min=4, help="Resize images to this.")]
TransferSize = Annotated[int | None, typer.Option("--transfer-size", min=1, help="Images of the attacker's split.")]
OwnerSize = Annotated[int | None, typer.Option("--owner-size", min=1, help="Images of the owner's split.")]
TestSize = Annotated[int | None, typer.Option("--test-size", min=1, help="Test images to use.")]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", help="Secret key made by keygen; - reads standard input."),
]
InsecureKey = Annotated[bool, typer.Option("--insecure-key-file", help="Accept a key file that others can read.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
PrecisionOption = Annotated[str, typer.Option("--precision", help="auto (measured at start), fp32 or bf16.")]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the training images.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=2, help="Images per step.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of initialisation, order and augmentation.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Arch = Annotated[
    str | None, typer.Option("--arch", metavar="NAME", help="Architecture, if it is not to be identified.")
]
Normalize = Annotated[
    str | None,
    typer.Option("--normalize", metavar="PRESET", help="Normalisation preset, if it is not to be found by trying."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Let the checkpoint run the code it contains. Dangerous.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Devices = Annotated[
    int, typer.Option("--devices", min=1, help="Processes that train together on this machine, one per GPU.")
]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Machines, started by torchrun or Slurm.")]
Strategy = Annotated[str, typer.Option("--strategy", help="How processes share the work; auto is DDP.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print plan, time and memory, and do nothing.")]
Profile = Annotated[
    Path | None,
    typer.Option("--profile", metavar="FILE", help="Write a torch profiler trace of some steps (for Perfetto)."),
]

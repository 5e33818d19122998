"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdbctl.cli.names import NAMES, complete

# the panels of --help
DATA, TRAINING, MACHINE, FILES = "Data", "Training", "Machine", "Files and output"
MOST_EPOCHS, MOST_IMAGES, MOST_PIXELS = 1_000_000, 1_000_000, 8192
"""The most of ``--epochs``, of images in a ``--batch-size``, and of an ``--image-size``: beyond, it is a slip."""

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        autocompletion=complete("data"),
        metavar="SPEC",
        help="Data set: a torchvision name, folder:PATH, parquet:PATH, npz:PATH, digits.",
        rich_help_panel=DATA,
    ),
]
DataRoot = Annotated[
    Path,
    typer.Option(
        "--data-root",
        metavar="FOLDER",
        envvar="SDBCTL_DATA",
        help="Where torchvision data sets are.",
        rich_help_panel=DATA,
    ),
]
Download = Annotated[
    bool, typer.Option("--download", help="Let torchvision download the data set.", rich_help_panel=DATA)
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size", metavar="PIXELS", min=4, max=MOST_PIXELS, help="Resize images to this.", rich_help_panel=DATA
    ),
]
TransferSize = Annotated[
    int | None,
    typer.Option(
        "--transfer-size",
        metavar="N",
        min=1,
        help="Images of the attacker's split, which students learn from.",
        rich_help_panel=DATA,
    ),
]
Surrogate = Annotated[
    str | None,
    typer.Option(
        "--surrogate",
        autocompletion=complete("data"),
        metavar="SPEC",
        help="Images of another data set, which are asked about, too.",
        rich_help_panel=DATA,
    ),
]
OwnerSize = Annotated[
    int | None,
    typer.Option("--owner-size", metavar="N", min=1, help="Images of the owner's split.", rich_help_panel=DATA),
]
TestSize = Annotated[
    int | None, typer.Option("--test-size", metavar="N", min=1, help="Test images to use.", rich_help_panel=DATA)
]
KeyFile = Annotated[
    list[Path] | None,
    typer.Option("--key-file", metavar="FILE", help="Secret key made by keygen; - reads standard input."),
]
InsecureKey = Annotated[
    bool,
    typer.Option("--insecure-key-file", help="Accept a key file that others can read.", rich_help_panel=FILES),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write.", rich_help_panel=FILES)
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.", rich_help_panel=FILES)]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda.", rich_help_panel=MACHINE)]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        autocompletion=complete("precisions"),
        metavar="NAME",
        help="auto (measured at start), fp32 or bf16.",
        rich_help_panel=MACHINE,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        metavar="N",
        min=1,
        max=MOST_EPOCHS,
        help="Passes over the training images.",
        rich_help_panel=TRAINING,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", metavar="N", min=2, max=MOST_IMAGES, help="Images per step.", rich_help_panel=TRAINING
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", metavar="NUMBER", help="Peak learning rate.", rich_help_panel=TRAINING),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        max=2**32 - 1,
        help="Seed of initialisation, order and augmentation.",
        rich_help_panel=TRAINING,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=FILES)]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="NAME",
        autocompletion=complete("students"),
        help="Architecture, if it is not to be identified.",
    ),
]
Normalize = Annotated[
    str | None,
    typer.Option(
        "--normalize",
        autocompletion=complete("normalisations"),
        metavar="PRESET",
        help=f"Normalisation, if it is not to be found by trying: {', '.join(NAMES['normalisations'])}, of "
        "which half is -1 to 1 and none 0 to 1.",
        rich_help_panel=DATA,
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Let the checkpoint run the code it contains. Dangerous.", rich_help_panel=FILES),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=TRAINING)]
Devices = Annotated[
    int,
    typer.Option(
        "--devices",
        metavar="N",
        min=1,
        help="Processes that train together on this machine, one per GPU.",
        rich_help_panel=MACHINE,
    ),
]
SEEDS = 5
"""Students per reported row, unless told otherwise."""
Jobs = Annotated[
    int,
    typer.Option("--jobs", min=0, help="Students side by side; 0 means one per CPU core, at most 4 on a GPU."),
]
Nodes = Annotated[
    int,
    typer.Option(
        "--nodes", metavar="N", min=1, help="Machines, started by torchrun or Slurm.", rich_help_panel=MACHINE
    ),
]
Strategy = Annotated[
    str,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help="How processes share the work; auto is DDP.",
        rich_help_panel=MACHINE,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print plan, time and memory, and do nothing.")]
Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        help="Write a torch profiler trace of some steps (for Perfetto).",
        rich_help_panel=MACHINE,
    ),
]

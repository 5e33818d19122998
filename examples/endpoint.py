"""Evaluate a classifier that is no file, here an HTTP service, by what it answers.

    python examples/endpoint.py FOLDER [EPOCHS [SEEDS]]

To have something to ask, a teacher of scikit-learn's digits is trained and served on this machine. An attacker with 128
labelled images asks it; the report in FOLDER says what the answers are worth. For a service of your own, change
:class:`Endpoint`.
"""

import json
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import Tensor, nn

from sdbctl import data
from sdbctl.boxstep import plain_step
from sdbctl.cells import Bench, EvalConfig, Source
from sdbctl.distill import build_student
from sdbctl.engine import Engine
from sdbctl.evaluate import evaluate
from sdbctl.report.render import write
from sdbctl.training import fit
from sdbctl.updates import Recipe


class Endpoint(nn.Module):
    """A network whose forward pass asks a service for probabilities."""

    def __init__(self, url: str, preprocess: data.Preprocess) -> None:
        super().__init__()
        self.url, self.preprocess = url, preprocess

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] → log-probabilities [B, classes]."""
        images = self.preprocess.undo(x).mul(255).round().clamp(0, 255).byte()
        request = urllib.request.Request(self.url, json.dumps(images.tolist()).encode())
        with urllib.request.urlopen(request) as answer:
            return torch.tensor(json.load(answer), device=x.device).clamp(min=1e-9).log()


def serve(net: nn.Module, preprocess: data.Preprocess) -> str:
    """Start a service that answers with probabilities, and return its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            images = torch.tensor(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            with torch.no_grad():
                answer = json.dumps(net(preprocess(images / 255)).softmax(1).tolist()).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def main(folder: Path, epochs: int = 120, seeds: int = 5) -> None:
    """Train, serve, evaluate, write the report."""
    dataset, engine = data.load("digits", root=Path("data")), Engine(torch.device("cpu"))
    splits = data.split(dataset, transfer=128, test=500)
    shape, classes = dataset.train.shape, len(dataset.classes)
    preprocess = data.Preprocess((0.5,), (0.5,), shape)
    teacher = build_student("cnn", classes, shape[0], 0)
    fit(teacher, plain_step, splits.owner, preprocess, Recipe(epochs=40, batch_size=64), engine)
    url = serve(teacher.eval(), preprocess)
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    bench = Bench(
        # the name must change with what the service answers, since its answers are kept in the folder
        {"boxed": Source(net=Endpoint(url, preprocess), sha256="digits service, version 1")},
        splits.transfer.alone(),
        splits.validation.alone(),
        splits.test.alone(),
        preprocess,
        EvalConfig("cnn-tiny", Recipe(epochs=epochs, batch_size=32), seeds=seeds, tune=3),
        engine,
        classes,
        dataset.fingerprint,
        answers=folder / "answers",
    )
    report = evaluate(bench, title="a service", box={})
    write(report, folder, force=True)
    print(report.verdict)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

"""Standard streams that are closed, full, not UTF-8, or whose reader leaves early."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from sdbctl.cli import output
from sdbctl.cli.output import Live

SDBCTL = f"{sys.executable} -m sdbctl"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("list data >&-", 0, ""),
        ("list data >/dev/full", 6, "No space left"),
        ("--help >/dev/full", 6, "No space left"),
        ("eval --help | true", 0, ""),
        ("--version | true", 0, ""),
        ("list nothing 2>/dev/full", 2, ""),
        ("list nothing >&- 2>&-", 2, ""),
    ],
)
def test_a_stream_that_does_not_work_changes_no_exit_code(command, code, message, tmp_path):
    words = ["bash", "-c", f"set -o pipefail; {SDBCTL} {command}"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in done.stderr and len(done.stderr.splitlines()) == bool(message)


def test_what_an_encoding_lacks_is_replaced(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [*SDBCTL.split(), "list", "λ"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "?" in done.stderr


def test_a_run_goes_on_when_nobody_reads_its_messages():
    code = (
        "from sdbctl.cli import say, streams; streams.mend(); [say('x' * 9999) for _ in range(99)]; raise SystemExit(5)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    process.stderr.close()
    assert process.wait(60) == 5


def test_who_takes_longer_counts_for_more_of_the_time_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(output, "err", Console(file=io.StringIO(), width=200))
    progress = Live()
    progress.start("students", 10, 20.0)
    now[0] += 600
    progress.advance(2, {}, 12.0)
    (line,) = output.err.file.getvalue().splitlines()
    assert line == "students 2/10, 10 min so far, about 7 min left"


def test_notes_do_not_control_the_terminal(capsys):
    Live().note("[b]a\x1b[31mb")
    assert capsys.readouterr().err == "[b]a[31mb\n"


def test_a_log_is_never_silent_for_long(monkeypatch, capsys):
    monkeypatch.setattr(output, "QUIET_SECONDS", 0.02)
    with Live() as progress:
        progress.start("students", 40)
        progress.advance(1, {"validation": 50.0})
        # long ago
        progress._begun = progress._since = progress._begun - 3600
        progress._known = 0
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and lines[0] == "students 1/40, 60 min so far, about 39.0 h left  validation 50.0"
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "it has ended"


@pytest.mark.parametrize("width", [70, 100, 160])
def test_how_far_a_run_is_shows_in_a_narrow_terminal(width, monkeypatch):
    console = Console(width=width, force_terminal=True, file=io.StringIO(), color_system=None)
    monkeypatch.setattr(output, "err", console)
    with Live() as progress:
        progress.start("reference", 320)
        progress.advance(64, dict.fromkeys(("label", "hide", "confidence", "teach", "clean", "keyed"), 0.123))
        progress._bars.refresh()
    last = [line for line in console.file.getvalue().splitlines() if "64/320" in line][-1]
    assert "reference" in last and "label" in last


def test_the_time_left_is_told_from_the_steps_that_it_was_measured_by(monkeypatch, capsys):
    # ten steps in the first second, then one every tenth of a second
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(output, "err", Console(file=io.StringIO(), width=200))
    progress = Live()
    progress.start("box", 100)
    for step in range(1, 101):
        now[0] += 0.09 if step <= 10 else 0.1
        progress.advance(1, {})
    lines = output.err.file.getvalue().splitlines()
    assert "20/100, 2 s so far, about 8 s left" in lines[1]
    assert lines[-1].startswith("box 100/100, 10 s so far") and "left" not in lines[-1]

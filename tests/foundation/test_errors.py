"""What a command leaves behind on stdout, stderr and in its exit code, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from medisee.foundation.errors import InputError, exit_code

def main(argv):
    {body}

sys.exit(exit_code(main))
"""


def run(body: str, shell: str = '"$PYTHON" -c "$CODE"', **environment: str) -> subprocess.CompletedProcess[bytes]:
    given = {"PYTHON": sys.executable, "CODE": CODE.format(body=body), "PATH": "/usr/bin:/bin", **environment}
    given["PYTHONPATH"] = ":".join(sys.path)
    return subprocess.run(["bash", "-c", f"{shell}"], env=given, capture_output=True, timeout=120)


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    done = run("for n in range(10**6): print(n)", '"$PYTHON" -c "$CODE" | head -1; exit ${PIPESTATUS[0]}')
    assert (done.returncode, done.stdout, done.stderr) == (141, b"0\n", b"")


def test_a_reader_that_goes_away_after_a_short_text() -> None:
    done = run("import time; print(1); time.sleep(1)", '"$PYTHON" -c "$CODE" | true; exit ${PIPESTATUS[0]}')
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_is_not_hidden() -> None:
    done = run("raise BrokenPipeError('of a socket')")
    assert done.returncode == 1 and b"of a socket" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    done = run("print(1); sys.stdout.write('x'); sys.stderr.write('y')", f'"$PYTHON" -c "$CODE" {closed}')
    assert done.returncode == 0


def test_every_text_can_be_printed_in_every_locale() -> None:
    settings = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = run("print('Lebersegment? 脾'); raise InputError('é.png: no such file.')", **settings)
    assert done.returncode == 2
    assert done.stdout == b"Lebersegment? \\u813e\n"
    assert done.stderr == b"error: \\xe9.png: no such file.\n"


def test_an_interrupt_is_one_word() -> None:
    done = run("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def test_an_interrupt_during_a_commands_imports_is_one_word() -> None:
    body = "from medisee.cli import main_of; sys.modules['torch'] = None; main_of('interrupted')([])"
    made = "import types; part = types.ModuleType('x'); part.__getattr__ = lambda name: (_ for _ in ()).throw(KeyboardInterrupt())"
    done = run(f"{made}; sys.modules['medisee.interrupted'] = part; {body}")
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")

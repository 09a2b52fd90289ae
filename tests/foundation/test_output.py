from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from medisee.foundation.errors import InputError
from medisee.foundation.output import locked


def test_a_second_run_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    with locked(out):
        code = (
            "import sys; from pathlib import Path; from medisee.foundation.errors import exit_code\n"
            "from medisee.foundation.output import locked\n"
            "sys.exit(exit_code(lambda _: locked(Path(sys.argv[1])).__enter__()))"
        )
        other = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
        assert (other.returncode, "another run is writing here" in other.stderr) == (2, True)
        (out / "result").touch()
    assert [path.name for path in out.iterdir()] == ["result"]
    with locked(out):
        pass


def test_a_folder_without_a_result_is_not_left(tmp_path: Path) -> None:
    with locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_an_error_inside_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mine"), locked(tmp_path):
        raise InputError("mine")
    with locked(tmp_path):
        pass

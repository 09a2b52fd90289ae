#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
Usage: ./scripts/test.sh [--all] [pytest arguments]

Makes .venv when needed, then runs every check that CI runs, until one fails:
ruff check, ruff format, codespell, import contracts, pyright, pytest. Offline after the installation.

  --all     also the tests that are left out by default (markers kill, scale, faults, browser)
  --help    this text

Other arguments go to pytest:
  ./scripts/test.sh tests/evaluation/test_metrics.py -k dice
PYTHON=/path/to/python3.12 chooses the Python that .venv is made with.
END
}

pytest_arguments=()
for argument in "$@"; do
  case $argument in
    -h | --help) usage && exit 0 ;;
    --all) pytest_arguments+=(-m "") ;;
    *) pytest_arguments+=("$argument") ;;
  esac
done

step=environment
trap 'code=$?; if ((code)); then echo "FAILED: $step (exit code $code)" >&2; fi' EXIT

check() { # name of the step, command
  step=$1
  echo "== $step"
  "${@:2}"
}

source scripts/environment.sh
environment demo,train,engine,laptop,dev

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # or it asks the network for a newer pyright
bin=.venv/bin
check "ruff check" $bin/ruff check .
check "ruff format" $bin/ruff format --check .
check "codespell" $bin/codespell
check "imports" $bin/lint-imports --no-cache
check "pyright" $bin/pyright
# Tests of named files start sooner in one process. A worker per core, a thread each: more would only wait for each other.
if [[ ${#pytest_arguments[@]} -eq 0 ]]; then
  pytest_arguments=(-n auto --maxprocesses 8 --dist loadfile)
  export OMP_NUM_THREADS=1
fi
# The odd expansion: bash 3.2, which macOS has, takes an empty array for an unset variable.
check "pytest" $bin/python -m pytest ${pytest_arguments[@]+"${pytest_arguments[@]}"}
echo "all checks passed in $SECONDS s"

# shellcheck shell=bash
# Sourced by train_4gpu.sh and train_hostfile.sh: `launch CONFIG [argument ...] -- LAUNCHER [option ...]`, and by
# train_slurm.sh for `run_folder`. All run from the repository's root.
#
# Ctrl-C, SIGTERM or `touch <train.out>/stop` stops a run after the current step, with its state saved (exit code 130,
# 143 or 0); --resume continues from there, also with another number of GPUs. The file `stop` replaces the signal, since
# DeepSpeed's launcher kills its ranks half a minute after a signal: too soon for a step and its state.

launch() {
  local arguments=() out launcher requested=0 code
  while [[ $1 != -- ]]; do
    arguments+=("$1")
    shift
  done
  shift
  out=$(run_folder ${arguments[@]+"${arguments[@]}"}) || return
  if ! command -v "$1" >/dev/null; then
    echo "error: '$1' is not installed; run pip install -e '.[train]' -c constraints.txt." >&2
    return 2
  fi
  mkdir -p "$out"
  trap 'requested=130 && touch "$out/stop"' INT
  trap 'requested=143 && touch "$out/stop"' TERM HUP
  # In a separate session: Ctrl-C must reach this script only.
  setsid "$@" scripts/train.py --config "${arguments[@]}" &
  launcher=$!
  # A signal ends `wait` too, while the launcher is still working.
  while :; do
    code=0
    wait "$launcher" || code=$?
    ((code > 128)) && kill -0 "$launcher" 2>/dev/null || break
    echo "asked the ranks to stop; their state will be saved" >&2
  done
  # A file that is still there was not seen: the run had already finished.
  if ((code == 0 && requested)) && [[ ! -e $out/stop ]]; then
    code=$requested
  fi
  rm -f "$out/stop"
  return "$code"
}

# Prints the folder of a run, from the arguments of train.py after --config; fails with the configuration's problems.
run_folder() {
  if [[ ! -f ${1:-} ]]; then
    echo "error: '${1:-}' is not a configuration; name one, such as configs/medisee_7b.yaml." >&2
    return 2
  fi
  "${PYTHON:-python}" - "$@" <<'END'
import sys
from medisee.config import load_config
from medisee.foundation.errors import exit_code

config, *arguments = sys.argv[1:]
overrides = [argument for argument in arguments if not argument.startswith("-")]
sys.exit(exit_code(lambda _: print(load_config(config, overrides).train.out)))
END
}

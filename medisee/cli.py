"""MediSee: ask about a medical image in plain words; get an explanation, a mask and a box.

  medisee ask ...        answer questions about images
  medisee train ...      train a model
  medisee eval ...       score a checkpoint, or the predictions of any system
  medisee prepare ...    turn a data set into manifests
  medisee convert ...    convert whole models: the authors' checkpoint, LoRA merged, the seg head alone
  medisee download ...   download published weights and check them
  medisee plan ...       memory, arithmetic and time of a run, before it starts
  medisee info [--json]  versions, devices, and what can be read and written

Each command has its own --help (`medisee help ask` prints it too); `medisee --version` prints the version. scripts/*.py in the repository are the same
commands, and `python -m data_gen` is the data engine. Research use only: not a medical device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from medisee.foundation.command_line import parse_words
from medisee.foundation.errors import InputError, exit_code, nearest

COMMANDS = {
    "ask": "inference",
    "train": "train",
    "eval": "eval",
    "prepare": "prepare_data",
    "convert": "convert",
    "download": "download_weights",
}
"""Commands that are a module's main."""
ALL = (*COMMANDS, "plan", "info")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that comes first on the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"] and words[1:]:
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(__doc__)
        return
    command, rest = words[0], words[1:]
    if command in ("-V", "--version", "version"):
        print(f"medisee {import_module('medisee').__version__}")
        return
    if command not in ALL:
        raise InputError(f"unknown command {command!r}; see medisee --help.{nearest(command, ALL)}")
    sys.argv[0] = f"medisee {command}"  # argparse's usage lines and run.json name it so
    if command in COMMANDS:
        main_of(COMMANDS[command])(rest)
    elif command == "plan":
        _plan(rest)
    else:
        _info(rest)


def main_of(module: str) -> Callable[[Sequence[str] | None], None]:
    """Returns a module's main, imported when it is called: an interrupt during the import ends in a sentence too."""
    return lambda argv=None: import_module(f"medisee.{module}").main(argv)


def console() -> int:
    """Runs `medisee` and returns its exit code: 2 for bad input."""
    return exit_code(main)


def _plan(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Prints parameters, memory, arithmetic, time and missing files of a run. Needs no weights, no data "
        "and no GPU, and takes about a minute for 7B.",
        epilog="With --config: a training run. With --checkpoint: asking that model.",
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="C", help="YAML run, such as configs/medisee_7b.yaml")
    model.add_argument("--checkpoint", metavar="DIR", help="folder that training wrote")
    add("--gpu", metavar="NAME", help="such as rtx4090 (default: a6000)")
    add("--gpus", metavar="N", help="with --config: number of GPUs (default: 4)")
    add("overrides", nargs="*", help="with --config: dotted overrides, such as train.batch_size=4")
    given = parse_words(parser, argv, more="overrides")
    gpu = ["--gpu", given.gpu] if given.gpu else []
    if given.config:
        gpus = ["--gpus", given.gpus] if given.gpus else []
        import_module("medisee.train").main(["--plan", "--config", given.config, *gpu, *gpus, *given.overrides])
    elif given.gpus or given.overrides:
        raise InputError("--gpus and overrides belong to --config; leave them out with --checkpoint.")
    else:
        import_module("medisee.inference").main(["--plan", "--checkpoint", given.checkpoint, *gpu])


def _info(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Prints versions, devices, seg heads, file formats and commands.")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    as_json = parse_words(parser, argv).json
    from medisee.info import facts, to_text

    print(json.dumps(facts(ALL), indent=2) if as_json else to_text(facts(ALL)))

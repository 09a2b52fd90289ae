"""Screening by people: a local page that shows each image with its target and asks about every pair. Run it as

  python -m data_gen review --ledger data/mlmr_sd/ledger.sqlite --reviewer anna
  python -m data_gen review --ledger data/mlmr_sd/ledger.sqlite --reviewer ben --share 0.1     a tenth of the images

Open the address that it prints. Every decision is in the ledger before the page goes on, so you can stop at any time
and start again with the same name. Only pairs whose words are final are shown, as a finished run leaves them. Two
reviewers with the same --share and --seed see the same pairs, neither sees the other's decisions, and the page shows
how far they agree (raw and Cohen's kappa). `python -m data_gen export --help` says what becomes of disagreements.

Keys: a accept, r reject with a reason, e edit, u undo, arrows move, m and b hide mask and box, ? help.

The page is reachable from this machine only (127.0.0.1) and only with the token in the printed address.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data_gen.ledger.ledger import Ledger
from data_gen.publishing.review_api import ReviewServer
from data_gen.publishing.review_session import ReviewSession
from medisee.foundation.command_line import a_path, parse_words
from medisee.foundation.errors import InputError

_LONGEST_NAME = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the page until Ctrl-C."""
    arguments = _arguments(argv)
    with Ledger(arguments.ledger) as ledger:
        session = ReviewSession(ledger, arguments.reviewer, share=arguments.share, seed=arguments.seed)
        server = ReviewServer(session, arguments.port)
        print(f"{session.done} of {session.total} pairs are judged by {arguments.reviewer}. Open\n\n  {server.url}\n")
        print("Ctrl-C ends; nothing is lost.", flush=True)
        try:
            server.run()
        except KeyboardInterrupt:
            print(f"\n{session.done} of {session.total} pairs are judged by {arguments.reviewer}.")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data_gen review", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--ledger", type=a_path, required=True, help="the ledger that `run` wrote")
    add("--reviewer", required=True, metavar="NAME", help="your name; decisions are stored under it")
    add("--share", type=float, default=1.0, help="share of the images to review, above 0 up to 1 (default: 1)")
    add("--seed", type=int, default=0, help="seed of the choice of these images (default: 0)")
    add("--port", type=int, default=8765, help="port of the page; 0 takes a free one (default: 8765)")
    arguments = parse_words(parser, argv)
    problems: list[str] = []
    name = arguments.reviewer
    if not name.strip() or name != name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        problems.append(f"--reviewer {name!r}: give a name of 1 to {_LONGEST_NAME} printable characters.")
    if not 0 < arguments.share <= 1:
        problems.append(f"--share {arguments.share}: expected a number above 0 and at most 1; correct it.")
    if not 0 <= arguments.port <= 65535:
        problems.append(f"--port {arguments.port}: expected 0 to 65535; correct it.")
    if problems:
        raise InputError(problems)
    return arguments

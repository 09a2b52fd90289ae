from collections.abc import Sequence

from medisee.foundation.errors import exit_code


def main(argv: Sequence[str] | None = None) -> None:
    # Imported here, so that a signal during the imports, which take seconds, ends with a sentence too.
    from medisee.train import main as train

    train(argv)


# The guard matters: data loader workers that are spawned import this file again.
if __name__ == "__main__":
    raise SystemExit(exit_code(main))

"""`python -m medisee` is the command `medisee`."""

from medisee.cli import console

if __name__ == "__main__":
    raise SystemExit(console())

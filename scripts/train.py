from importlib import import_module

from medisee.foundation.errors import exit_code

# The guard matters: data loader workers that are spawned import this file again. The rest is imported inside, so that a
# signal during the imports, which take seconds, ends with a sentence too.
if __name__ == "__main__":
    raise SystemExit(exit_code(lambda argv: import_module("medisee.train").main(argv)))

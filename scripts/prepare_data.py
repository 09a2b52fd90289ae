from medisee.foundation.errors import exit_code
from medisee.prepare_data import main

# The guard matters: the processes that read masks import this file again.
if __name__ == "__main__":
    raise SystemExit(exit_code(main))

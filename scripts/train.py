from medisee.foundation.errors import exit_code
from medisee.train import main

# The guard matters: data loader workers that are spawned import this file again.
if __name__ == "__main__":
    raise SystemExit(exit_code(main))

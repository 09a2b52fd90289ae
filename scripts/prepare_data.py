from medisee.cli import main_of
from medisee.foundation.errors import exit_code

main = main_of("prepare_data")

# The guard matters: the processes that read masks import this file again.
if __name__ == "__main__":
    raise SystemExit(exit_code(main))

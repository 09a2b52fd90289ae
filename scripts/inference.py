from medisee.cli import main_of
from medisee.foundation.errors import exit_code

main = main_of("inference")
if __name__ == "__main__":
    raise SystemExit(exit_code(main))

from medisee.errors import exit_code
from medisee.eval import main

if __name__ == "__main__":
    raise SystemExit(exit_code(main))

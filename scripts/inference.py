from medisee.foundation.errors import exit_code
from medisee.inference import main

if __name__ == "__main__":
    raise SystemExit(exit_code(main))

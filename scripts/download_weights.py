from medisee.download_weights import main
from medisee.foundation.errors import exit_code

if __name__ == "__main__":
    raise SystemExit(exit_code(main))

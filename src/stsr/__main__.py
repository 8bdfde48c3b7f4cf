"""Run the command line: ``python -m stsr``."""

from stsr.cli.app import main

if __name__ == "__main__":
    main()

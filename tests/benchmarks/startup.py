"""Start-up time of the command line: ``python tests/benchmarks/startup.py``. Goal: ``stsr --help`` under 0.5 s."""

import statistics
import subprocess
import sys
import time

REPEATS = 7


def seconds(*arguments: str) -> list[float]:
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    for name, arguments in {
        "python -c pass": ("-c", "pass"),
        "import stsr": ("-c", "import stsr"),
        "stsr --version": ("-m", "stsr", "--version"),
        "stsr --help": ("-m", "stsr", "--help"),
        "stsr superres --help": ("-m", "stsr", "superres", "--help"),
    }.items():
        taken = seconds(*arguments)
        print(f"{name:<22} median {statistics.median(taken):.3f} s, best {min(taken):.3f} s of {REPEATS}")


if __name__ == "__main__":
    main()

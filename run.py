"""Entry point: `python run.py --help`."""

from semseg.cli.entry import run_program

if __name__ == "__main__":
    run_program()

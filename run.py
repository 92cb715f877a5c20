"""Entry point: `python run.py --help`."""

from semseg.cli.entry import main

if __name__ == "__main__":
    main()

"""Entry point: `python run.py --help`."""

from semseg.launch import main

if __name__ == "__main__":
    main()

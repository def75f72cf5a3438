"""`python -m mmmodel`: the command line without an installed console script."""

from mmmodel.cli import main

if __name__ == "__main__":
    main()

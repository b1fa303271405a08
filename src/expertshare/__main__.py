"""`python -m expertshare`: the command line."""

from expertshare.cli import main

if __name__ == "__main__":
    main()

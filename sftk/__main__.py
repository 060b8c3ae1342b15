"""`python -m sftk`: the command without its console script."""

from sftk.cli.main import main

if __name__ == "__main__":
    main()

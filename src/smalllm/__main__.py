"""``python -m smalllm`` and the console script."""

from smalllm.cli import main

if __name__ == "__main__":
    main()

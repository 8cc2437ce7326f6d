"""`python -m gptoughts`, which torchrun needs: the same as the command `gptoughts`."""

from gptoughts.cli import main

if __name__ == "__main__":
    main()

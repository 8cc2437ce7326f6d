"""`python -m gptoughts`, which torchrun needs: the same as the command `gptoughts`."""

from gptoughts.cli.main import main

if __name__ == "__main__":
    main()

"""``python -m guided_dropout``: the command line, as launchers of several processes start it."""

from guided_dropout.cli.app import main

if __name__ == "__main__":
    main()

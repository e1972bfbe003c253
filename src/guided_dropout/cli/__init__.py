"""The command line; ``app`` has its commands and its entry point."""

"""What is done with a finished run, or with the code: each is a command, python -m tools.NAME."""

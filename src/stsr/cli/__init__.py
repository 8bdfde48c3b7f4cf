"""The command line: the only room that uses typer and rich."""

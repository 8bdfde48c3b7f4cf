"""The commands: one folder for each."""

"""What users type: one folder for each command."""

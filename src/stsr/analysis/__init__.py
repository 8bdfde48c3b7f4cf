"""What is made of maps: scores, figures and downstream results. No torch here."""

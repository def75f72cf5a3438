"""The one command for whenever a GPU is at hand: stages in order of worth, JSON after each."""

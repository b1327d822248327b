"""Other people's frameworks, each in its own file."""

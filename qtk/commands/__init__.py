"""The commands, each a function: `qtk.cli` gives them their names."""

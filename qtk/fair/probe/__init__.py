"""Where discriminatory inputs are looked for, a file each; the protocol stands in `qtk.fair`."""

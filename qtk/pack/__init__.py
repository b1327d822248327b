"""Codes to bytes for the disk; one file a layout, each with `pack` and its inverse `unpack`."""

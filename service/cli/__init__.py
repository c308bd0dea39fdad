"""The command line: `patchforge …`."""

"""The two networks, their parts, and the text encoder."""

"""`patchforge soak`: mixed traffic while processes are killed; at the end, nothing accepted may be lost."""

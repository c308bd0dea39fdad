"""Experiments with samplers, forward passes and training recipes. Each compares with a baseline."""

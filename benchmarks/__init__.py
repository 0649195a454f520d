"""Measures what agentvm promises: `make bench`. Each figure against its goal, each ratio against a yardstick of the same run."""

"""Builds and finds guest images from a declared spec."""

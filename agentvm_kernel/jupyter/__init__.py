"""Speaks Jupyter: sockets, proxy, kernel process. Imports sandbox; never libvirt."""

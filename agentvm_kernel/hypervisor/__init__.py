"""Speaks libvirt: connection, domain XML, machine states, reaping. The only place that imports libvirt."""

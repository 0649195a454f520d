"""One sandbox is one leased machine with its connection. Knows neither Jupyter nor libvirt."""

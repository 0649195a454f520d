"""Bytes between host and guest over vsock or virtio-serial. Moves messages; never looks into them."""

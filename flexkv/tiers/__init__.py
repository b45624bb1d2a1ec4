"""Where bytes are: paged GPU caches and the host pool."""

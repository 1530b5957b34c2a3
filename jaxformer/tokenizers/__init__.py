"""Text to integers and back without JAX; images with it (`image`, `vq`, `patch_kmeans`)."""

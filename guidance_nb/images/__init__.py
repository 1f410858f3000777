"""Images: data and sample files, networks by name, feature extractors, metrics, and latents; one module each."""

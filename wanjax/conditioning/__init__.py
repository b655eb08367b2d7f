"""What goes into the network beside the noise: text and image features, mask, latents of the given frames."""

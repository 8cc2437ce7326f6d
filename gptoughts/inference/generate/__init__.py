"""Text generation: autoregressive, diffusion, offloaded."""

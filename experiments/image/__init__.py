"""Pictures: a text-conditional diffusion model that is trained from nothing, and what adapters do to it."""

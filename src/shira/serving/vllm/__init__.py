"""The vLLM engine: a scheduler of turns, workers that switch between steps, and plugins. `environment.py` says which versions."""

"""The vLLM engine: a scheduler of turns, workers that switch between steps, and plugins. Versions are in `environment.py`."""

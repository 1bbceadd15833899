"""Generation over the pipeline. Imports checkpoint, data, models and parallel."""

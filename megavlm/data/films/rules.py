"""Film plans of the published families."""

"""Planning: what a recipe needs and takes on a cluster, computed without one; no torch is imported here."""

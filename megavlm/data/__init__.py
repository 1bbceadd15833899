"""Data: conversations and images become packed micro-batches; imports config and parallel."""

"""One linear layer, or several with GELU between them."""

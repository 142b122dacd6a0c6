"""How good an encoder is: semantic textual similarity."""

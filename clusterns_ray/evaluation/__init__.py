"""How good an encoder is: similarity, transfer, clustering, geometry; and whether two differ."""

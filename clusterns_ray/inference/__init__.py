"""What a finished encoder is used for: encoding files, indexing and searching them."""

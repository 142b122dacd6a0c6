"""The encoder: its transformer, tokenizer, pooling and prompt; reading and writing model directories."""

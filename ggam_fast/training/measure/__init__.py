"""Numbers from logits and maps. No module here reads files or draws pictures."""

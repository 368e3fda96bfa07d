"""From raw files to batches: read (c4, metaicl), tokenise once (tokenize, prepared), sample (sampling), pad (batches)."""

"""From raw files to batches: read (c4, metaicl), tokenise once (tokenize, prepared), draw (sampling), pad (batches)."""

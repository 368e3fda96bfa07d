"""The order in which documents are read."""

import grain

from mend_jax.cli.errors import UserError


def document_order(documents: range, seed: int, shuffle: bool):
    """Documents by row number, without end: every document once per epoch, each epoch in a new order if `shuffle`."""
    if not len(documents):
        raise UserError("There is no text at all: config.data.text holds no documents.")
    order = grain.MapDataset.range(documents.start, documents.stop)
    return (order.seed(seed).shuffle() if shuffle else order).repeat()

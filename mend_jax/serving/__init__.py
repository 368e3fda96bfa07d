"""A small HTTP server of packs: demonstrations in, answers out."""

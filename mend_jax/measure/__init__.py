"""The measurements of the command benchmark and the figures of the command scaling."""

"""The report of a workdir of experiments: what they left, as tables and figures on one page."""

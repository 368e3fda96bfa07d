"""From options to tables: scores, metrics, costs, results."""

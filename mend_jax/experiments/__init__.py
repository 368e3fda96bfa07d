"""The paper's studies, as lists of configs over the commands."""

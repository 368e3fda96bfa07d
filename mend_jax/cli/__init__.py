"""What a person meets: the command line, the values of a config, sentences for mistakes."""

"""Options, option files and recipes."""

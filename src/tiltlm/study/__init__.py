"""A study: tasks × methods × seeds in one command."""

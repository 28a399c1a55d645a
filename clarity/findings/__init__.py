"""What an audit shows, in sentences: each check in the file of its family, all of them in registry.py."""

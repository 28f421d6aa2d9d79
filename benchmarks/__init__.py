"""Each published figure by one command."""
